"""Everything of SGLang that OrbitFlow relies on, against one table: ``sglang_contract.txt``.

What is imported or hooked, with its signature, and which attributes of SGLang's objects are
read or set, public or not. It is read from our own code, so nothing can be forgotten; another
SGLang, or a change of ours, shows as a diff. ``python tests/engine/test_contract.py`` writes
the table anew.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TABLE = Path(__file__).with_name("sglang_contract.txt")
PACKAGE = Path(__file__).resolve().parents[2] / "orbitflow_sglang"
# What our engine calls SGLang's objects, and what they are.
OBJECTS = {
    "scheduler": "sglang.srt.managers.scheduler.Scheduler",
    "batch": "sglang.srt.managers.schedule_batch.ScheduleBatch",
    "running": "sglang.srt.managers.schedule_batch.ScheduleBatch",
    "last": "sglang.srt.managers.schedule_batch.ScheduleBatch",
    "req": "sglang.srt.managers.schedule_batch.Req",
    "forward_batch": "sglang.srt.model_executor.forward_batch_info.ForwardBatch",
    "layer": "sglang.srt.layers.radix_attention.RadixAttention",
    "core": "sglang.srt.mem_cache.unified_cache.unified_tree_core_interface."
    "UnifiedTreeCoreInterface",
    "manager": "sglang.srt.managers.tokenizer_manager.TokenizerManager",
    "state": "sglang.srt.managers.tokenizer_manager.ReqState",
    "dp_controller": "sglang.srt.managers.data_parallel_controller.DataParallelController",
}


def sources() -> Iterator[ast.Module]:
    for path in sorted([*PACKAGE.glob("engine/*.py"), PACKAGE / "plugin.py"]):
        yield ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported() -> Iterator[str]:
    """Names that we import from SGLang, as module.name."""
    for tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang."):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def hooked() -> Iterator[str]:
    """Names that we wrap."""
    from orbitflow_sglang.engine import hooks

    for table in (hooks.ALWAYS, hooks.LAUNCHER, hooks.CONTROLLER, hooks.SCHEDULER):
        yield from (hook.target for hook in table)


def used() -> Iterator[tuple[str, str]]:
    """Classes of SGLang, and attributes of theirs that our code names."""
    for tree in sources():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            value = ast.unparse(node.value)
            owner = OBJECTS.get(value.rpartition(".")[2].lstrip("_"))
            if owner is not None and not node.attr.startswith("__"):
                yield owner, node.attr


def signature(name: str) -> str:
    """How ``name`` is called; what else it is where it is not called."""
    try:
        found = pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        return " is missing"
    if inspect.ismodule(found):
        return " module"
    if isinstance(found, type):
        return " class"
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return f" {type(found).__name__}"
    shown = []
    for one in parameters:
        star = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
        shown.append(star + one.name + ("" if one.default is one.empty else "="))
    return f"({', '.join(shown)})"


def has(owner: type[Any], name: str) -> bool:
    """Whether instances have that attribute: of the class, or set by one of its methods."""
    if hasattr(owner, name) or name in getattr(owner, "__annotations__", {}):
        return True
    modules = {base.__module__ for base in owner.__mro__ if base.__module__.startswith("sglang")}
    return any(name in assigned(module) for module in modules)


@functools.cache
def assigned(module: str) -> set[str]:
    """Names that code of ``module`` sets on ``self``, or declares."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(importlib.import_module(module)))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node.value) in ("self", "scheduler"):
                found.add(node.attr)
        elif isinstance(node, ast.AnnAssign):
            found.add(ast.unparse(node.target))
    return found


def contract() -> list[str]:
    """The table as it is now."""
    lines = ["# imported"]
    lines += [name + signature(name) for name in sorted(set(imported()))]
    lines += ["", "# hooked"]
    lines += [name + signature(name) for name in sorted(set(hooked()))]
    lines += ["", "# attributes"]
    for owner, name in sorted(set(used())):
        missing = not has(pkgutil.resolve_name(owner), name)
        lines.append(f"{owner}.{name}" + (" is missing" if missing else ""))
    return lines


def test_sglang_is_what_we_rely_on() -> None:
    stored = TABLE.read_text(encoding="utf-8").splitlines()
    found = contract()
    diff = "\n".join(difflib.unified_diff(stored, found, "relied on", "found", lineterm=""))
    if diff:
        pytest.fail(f"SGLang, or what we use of it, has changed:\n{diff}")
    assert not [line for line in found if line.endswith("is missing")]


if __name__ == "__main__":
    TABLE.write_text("\n".join(contract()) + "\n", encoding="utf-8")
    sys.exit(0)
