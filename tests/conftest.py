"""Markers by folder, skipping what this machine cannot run, and the identity summary."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
KINDS = ("unit", "engine", "gpu")
# Of servers that are asked little, or are not even started; none is compared with stock SGLang.
AT_REST = {
    f"test_{name}.py"
    for name in (
        "contract", "hooks", "launch", "pausing", "prefixes", "refusals", "refused_models",
        "series", "slo_requests",
    )
}  # fmt: skip

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
    """Servers under load one at a time, in one process; other files beside them."""
    from xdist.scheduler import LoadScopeScheduling

    class ServersApart(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            if not file.startswith(("tests/engine/", "tests/gpu/")):
                return file
            return "servers at rest" if Path(file).name in AT_REST else "servers"

    return ServersApart(config, log)


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
