"""Fixtures of the tests that start real servers."""

from __future__ import annotations

import importlib
import os
from importlib.metadata import files
from pathlib import Path
from types import ModuleType

import pytest
from servers import MODELS, Stock

from eval.tiny_model import TinyModel, build

# Each process of SGLang imports every model that it knows, two seconds long: not here.
_KNOWN = {path.stem for path in files("sglang") or () if path.match("sglang/srt/models/*.py")}
os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(sorted(_KNOWN - MODELS.keys()))


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Stock:
    """Answers of stock SGLang, each asked for once a test run."""
    folder = tmp_path_factory.getbasetemp()  # of this process
    return Stock(folder if worker_id == "master" else folder.parent)


@pytest.fixture(scope="module")
def compat() -> ModuleType:
    """Imported by the first test that needs it, so that collecting tests does not take seconds."""
    return importlib.import_module("orbitflow_sglang.engine.compat")


@pytest.fixture(scope="module")
def model() -> Path:
    return build(TinyModel())
