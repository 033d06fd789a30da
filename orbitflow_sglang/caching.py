"""Where things are kept that were measured or compiled at an earlier start."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_ENV = "ORBITFLOW_CACHE_DIR"


def cache_folder() -> Path:
    """The folder of measured profiles and compiled kernels.

    ``$ORBITFLOW_CACHE_DIR``, else ``$XDG_CACHE_HOME/orbitflow_sglang``, else
    ``~/.cache/orbitflow_sglang``.
    """
    if own := os.environ.get(CACHE_ENV):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(shared) / "orbitflow_sglang"
