"""What may import what, and rules for the files of the whole repository."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "orbitflow_sglang"
MAX_LINES = 500
HEAVY = ("torch", "sglang", "transformers", "numpy", "scipy")
# In pieces, so that this file does not match.
REGISTRY = re.compile("--index" + "-url|--find" + "-links|https?://[^ ]*py" + "pi|/sim" + "ple")


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere in it, functions included."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return {name.partition(".")[0] for node in ast.walk(tree) for name in _names(node)}


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        yield node.module or ""
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
        if called in ("import_module", "__import__"):
            yield str(node.args[0].value)


def python_files(*folders: str) -> list[Path]:
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert files, f"no Python files in {folders}"
    return files


def relative(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize(
    "statement",
    ["import sglang.srt", "def f():\n from sglang import x", "import_module('sglang.srt')"],
)
def test_every_way_of_importing_is_seen(statement: str, tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(statement)
    assert imported_packages(source) == {"sglang"}


def test_only_engine_and_plugin_import_sglang() -> None:
    def may(path: Path) -> bool:
        return path == PACKAGE / "plugin.py" or path.is_relative_to(PACKAGE / "engine")

    files = python_files("orbitflow_sglang", "eval")
    wrong = [path for path in files if "sglang" in imported_packages(path) and not may(path)]
    assert relative(wrong) == []


def test_the_planner_imports_neither_torch_nor_sglang() -> None:
    files = python_files("orbitflow_sglang/planner")
    wrong = [path for path in files if imported_packages(path) & {"torch", "sglang"}]
    assert relative(wrong) == []


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [("orbitflow_sglang", HEAVY), ("orbitflow_sglang.planner", ("torch", "sglang"))],
)
def test_an_import_loads_nothing_heavy(module: str, unwanted: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([n for n in {unwanted!r} if n in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_no_file_is_over_500_lines() -> None:
    files = python_files("orbitflow_sglang", "eval", "tests")
    long = [path for path in files if len(path.read_text().splitlines()) > MAX_LINES]
    assert relative(long) == []


def test_kernels_and_patches_are_no_packages() -> None:
    for folder in ("kernels", "patches"):
        assert (ROOT / folder).is_dir()
        assert list((ROOT / folder).rglob("__init__.py")) == []


@pytest.mark.parametrize(
    "line", ["pip install --index" + "-url x", "https://py" + "pi.org/x", "mirror/sim" + "ple/"]
)
def test_a_registry_address_is_recognised(line: str) -> None:
    assert REGISTRY.search(line)


def test_no_tracked_file_holds_a_registry_address() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    files = [ROOT / name for name in listed.split("\0") if name]
    assert files
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in files
        if path.is_file()
        and (match := REGISTRY.search(path.read_text(encoding="utf-8", errors="replace")))
    ]
    assert found == []
