"""Fixtures of the tests that start real servers."""

from __future__ import annotations

import os
from importlib.metadata import files

import pytest
from servers import MODELS, Stock

# Each process of SGLang imports every model that it knows, two seconds long: not here.
_KNOWN = {path.stem for path in files("sglang") or () if path.match("sglang/srt/models/*.py")}
os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(sorted(_KNOWN - MODELS.keys()))


@pytest.fixture(scope="session")
def stock() -> Stock:
    """Answers of stock SGLang, each asked for once a session."""
    return Stock()
