"""Markers by folder, skipping what this machine cannot run, and the identity summary."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
KINDS = ("unit", "engine", "gpu")
FULL = os.environ.get("ORBITFLOW_TEST_FULL") == "1"

# The same examples each time, however slow the machine.
settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")

# `eval` is not installed: with this a plain `pytest` finds it too.
sys.path.insert(0, str(ROOT))

from eval.identity import Comparison, write_summary  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not any(item.get_closest_marker(kind) for kind in KINDS):
            item.add_marker(_kind_of(item.path))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and (reason := _why_no_gpu()):
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """File by file, those with servers first. One after another: what needs the GPU, and in full,
    where servers are under load for long, all that starts servers."""
    from xdist.scheduler import LoadScopeScheduling

    apart = ("tests/engine/", "tests/gpu/") if FULL else ("tests/gpu/",)

    class FileByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "apart" if nodeid.startswith(apart) else nodeid.split("::")[0]

    config.option.loadscopereorder = False  # as collected: the engine's tests come first
    return FileByFile(config, log)


def _kind_of(path: Path) -> str:
    """A test without a marker has that of its folder, so that none belongs to no kind."""
    folder = path.relative_to(TESTS).parts[0] if path.is_relative_to(TESTS) else ""
    if folder not in KINDS:
        raise pytest.UsageError(f"{path}: mark the test, or put it in one of tests/{KINDS}")
    return folder


def _why_no_gpu() -> str:
    import torch

    if torch.cuda.is_available():
        return ""
    return "needs an NVIDIA GPU, and torch.cuda.is_available() is False here"


@pytest.fixture(scope="session")
def identity_cells() -> Iterator[dict[str, Comparison]]:
    """Cells of the identity tests by name: put each Comparison in.

    With ORBITFLOW_TEST_SUMMARY=FILE in the environment they are written there at the end.
    """
    cells: dict[str, Comparison] = {}
    yield cells
    target = os.environ.get("ORBITFLOW_TEST_SUMMARY")
    if target and cells:
        command = os.environ.get("ORBITFLOW_TEST_COMMAND", "pytest tests/engine")
        write_summary(ROOT / target, cells, command)
