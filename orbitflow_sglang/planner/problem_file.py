"""Planning problems and plans as JSON: what ``python -m orbitflow_sglang plan`` reads and
prints, and what travels to the worker and back. Every error names the key."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import orjson

from orbitflow_sglang.planner.modes import find_mode
from orbitflow_sglang.planner.patterns import parse_pattern
from orbitflow_sglang.planner.problem import Plan, PlanningProblem, Unit

MAX_LAYERS = 4096
MAX_PAGES = 2**40  # sums over units and layers stay exact
SHORTEST_S, LONGEST_S = 1e-12, 1e6  # outside, a time is a wrong unit


class ProblemError(ValueError):
    """A problem that is not well formed; the message begins with the key."""


Reader = Callable[[str, Any], Any]


def load_problem(text: bytes) -> PlanningProblem:
    """The problem in a JSON file's content. Raises ``ProblemError``."""
    try:
        values = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ProblemError(f"not JSON: {error}") from None
    return parse_problem(values)


def parse_problem(values: object, *, clip: bool = False) -> PlanningProblem:
    """The problem in decoded JSON. Raises ``ProblemError``.

    ``clip``: of a range that ends beyond its unit, which has lost pages since, only what is
    there counts.
    """
    fields = _fields("", values, _PROBLEM, required=_REQUIRED)
    listed = fields.pop("units")
    units = []
    for number, unit in enumerate(listed):
        where = f"units[{number}]"
        units.append(Unit(**_fields(where, unit, _UNIT, required=("id", "pages_per_layer"))))
    _check_units(units, fields["layers"], clip)
    return PlanningProblem(units=tuple(units), **fields)


def problem_as_json(problem: PlanningProblem) -> dict[str, Any]:
    """What ``parse_problem`` reads; keys at their default are left out."""
    values = _without_defaults(problem, PlanningProblem, skip="units")
    units = [_without_defaults(unit, Unit) for unit in problem.units]
    return values | {"units": units}


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """The plan as the command prints it; seconds, pages of one layer, 1-based layers."""
    return {
        "status": plan.status,
        "step_time_s": plan.step_time_s,
        "stall_s": plan.stall_s,
        "lower_bound_s": plan.lower_bound_s,
        "gap": plan.gap,
        "solve_s": plan.solve_s,
        "arena_pages_used": plan.arena_pages_used,
        "ring_pages": plan.ring_pages,
        "streamed_pages": plan.streamed_pages,
        "migration_pages": plan.migration_pages,
        "never_fits": list(plan.never_fits),
        "units": [
            {
                "id": unit.id,
                "pattern": unit.pattern,
                "offloaded_layers": list(unit.offloaded_layers),
                "paused": unit.paused,
                "slo_met": unit.slo_met,
            }
            for unit in plan.units
        ],
    }


# --- inside -------------------------------------------------------------------


def _fields(
    where: str, values: object, readers: Mapping[str, Reader], required: tuple[str, ...]
) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ProblemError(f"{where or 'the problem'}: must be an object, got {_shown(values)}")
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in readers:
            known = ", ".join(readers)
            raise ProblemError(f"{prefix}{key}: no such key; there are {known}")
    for key in required:
        if key not in values:
            raise ProblemError(f"{prefix}{key}: is missing")
    return {key: readers[key](prefix + key, value) for key, value in values.items()}


def _check_units(units: list[Unit], layers: int, clip: bool) -> None:
    requests = {unit.id for unit in units if not unit.shared_by}
    seen = set()
    for number, unit in enumerate(units):
        where = f"units[{number}]"
        if unit.id in seen:
            raise ProblemError(f"{where}.id: {unit.id!r} is there twice")
        seen.add(unit.id)
        for user in unit.shared_by:
            if user not in requests:
                raise ProblemError(f"{where}.shared_by: {user!r} is the id of no request")
        for key in ("tpot_slo_s", "deposit_tokens", "age_s"):
            if unit.shared_by and getattr(unit, key):
                raise ProblemError(f"{where}.{key}: a shared prefix has none of its own")
        if isinstance(unit.present, str):
            try:
                parse_pattern(unit.present, layers, unit.pages_at_end, clip=clip)
            except ValueError as error:
                raise ProblemError(f"{where}.present: {error}") from None
        elif any(layer > layers for layer in unit.present):
            raise ProblemError(f"{where}.present: there are layers 1 to {layers}")


def _integer(least: int, most: int = MAX_PAGES) -> Reader:
    def read(where: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ProblemError(
                f"{where}: must be an integer from {least} to {most}, got {_shown(value)}"
            )
        return value

    return read


def _number(least: float, most: float) -> Reader:
    def read(where: str, value: Any) -> float:
        usable = isinstance(value, int | float) and not isinstance(value, bool)
        if not usable or not math.isfinite(value) or not least <= value <= most:
            raise ProblemError(
                f"{where}: must be a number from {least:g} to {most:g}, got {_shown(value)}"
            )
        return float(value)

    return read


def _optional(read: Reader) -> Reader:
    return lambda where, value: None if value is None else read(where, value)


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ProblemError(f"{where}: must be a string of some length, got {_shown(value)}")
    return value


def _mode(where: str, value: Any) -> str:
    try:
        find_mode(_text(where, value))
    except ProblemError:
        raise
    except ValueError as error:
        raise ProblemError(f"{where}: {error}") from None
    return str(value)


def _list_of(read: Reader) -> Reader:
    def read_all(where: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ProblemError(f"{where}: must be a list, got {_shown(value)}")
        items = tuple(read(f"{where}[{number}]", item) for number, item in enumerate(value))
        if len(set(items)) < len(items):
            raise ProblemError(f"{where}: names something twice")
        return items

    return read_all


def _units(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ProblemError(f"{where}: must be a list of objects, got {_shown(value)}")
    return value


def _layers_or_pattern(where: str, value: Any) -> tuple[int, ...] | str:
    if isinstance(value, str):
        return value
    layers: tuple[int, ...] = _list_of(_integer(1, MAX_LAYERS))(where, value)
    return layers


def _shown(value: object) -> str:
    text = orjson.dumps(value, default=repr).decode()
    return text if len(text) <= 60 else text[:57] + "..."


def _without_defaults(item: Any, kind: type, skip: str = "") -> dict[str, Any]:
    found = {}
    for name, field in kind.__dataclass_fields__.items():  # type: ignore[attr-defined]
        value = getattr(item, name)
        if name != skip and value != field.default:
            found[name] = value.item() if isinstance(value, np.generic) else value
    return found


_PROBLEM: dict[str, Reader] = {
    "layers": _integer(1, MAX_LAYERS),
    "arena_pages": _integer(1),
    "layer_compute_s": _number(SHORTEST_S, LONGEST_S),
    "page_transfer_s": _number(SHORTEST_S, LONGEST_S),
    "units": _units,
    "mode": _mode,
    "window_steps": _integer(1, 10**6),
    "stream_budget_pages": _optional(_integer(0)),
    "ring_pages": _optional(_integer(2)),
    "transfer_setup_s": _number(0, LONGEST_S),
    "host_pages": _optional(_integer(0)),
    "time_limit_s": _optional(_number(0, LONGEST_S)),
    "average_pages_per_layer": _optional(_number(0, MAX_PAGES)),
}
_REQUIRED = ("layers", "arena_pages", "layer_compute_s", "page_transfer_s", "units")
_UNIT: dict[str, Reader] = {
    "id": _text,
    "pages_per_layer": _integer(0, 2**31),
    "tpot_slo_s": _optional(_number(SHORTEST_S, LONGEST_S)),
    "deposit_tokens": _number(-1e9, 1e9),
    "shared_by": _list_of(_text),
    "present": _layers_or_pattern,
    "growth_pages_per_layer": _integer(0, 2**31),
    "age_s": _number(0, 1e12),
}
