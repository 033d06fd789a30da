"""Files of cost profiles: one that the operator gives, and those kept from earlier starts."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import orjson

from orbitflow_sglang.caching import cache_folder
from orbitflow_sglang.config import ConfigError, flag
from orbitflow_sglang.planner.cost_model import Profile

logger = logging.getLogger(__name__)


def read_given(path: str, layers: int, page_bytes: int | None = None) -> Profile:
    """The profile in the file that ``--orbitflow-profile`` names.

    Raises ``ConfigError`` where it cannot be read, is malformed, or is of another model:
    of another number of layers, or of other pages. ``page_bytes`` None: not known yet.
    """
    given = f"{flag('profile')} {path}"
    fix = "give a profile of this model and page size, or leave the flag out to have it measured"
    try:
        profile = Profile.load(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"{given}: cannot be read ({error.strerror}): {fix}") from None
    except ValueError as error:
        raise ConfigError(f"{given}: {error}: {fix}") from None
    if (reason := mismatch(profile, layers, page_bytes)) is not None:
        raise ConfigError(f"{given}: {reason}: {fix}")
    return profile


def mismatch(profile: Profile, layers: int, page_bytes: int | None) -> str | None:
    """Why ``profile`` is not one of this model and page size; None when it may be."""
    if profile.compute.layers != layers:
        return f"it is of a model with {profile.compute.layers} layers, and this one has {layers}"
    if page_bytes is not None and profile.page_bytes != page_bytes:
        return f"its pages have {profile.page_bytes} bytes, and here they have {page_bytes}"
    return None


def cache_file(key: Mapping[str, object]) -> Path:
    """The file of the profile measured under ``key``: everything that its numbers depend on."""
    text = orjson.dumps(key, option=orjson.OPT_SORT_KEYS)
    return cache_folder() / f"profile-{hashlib.sha256(text).hexdigest()[:16]}.json"


def read_cached(path: Path, layers: int, page_bytes: int) -> Profile | None:
    """The profile kept at ``path``; None where there is none, or none that can be used."""
    try:
        profile = Profile.load(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("OrbitFlow measures anew: the cost profile %s is broken (%s)", path, error)
        return None
    if (reason := mismatch(profile, layers, page_bytes)) is not None:
        logger.warning("OrbitFlow measures anew: of the cost profile %s, %s", path, reason)
        return None
    return profile


def write_cached(path: Path, profile: Profile) -> None:
    """Keep ``profile`` at ``path``, wholly or not at all; a failure is logged, no more."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
        with os.fdopen(handle, "wb") as file:
            file.write(profile.dump())
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("OrbitFlow cannot keep its cost profile at %s: %s", path, error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
