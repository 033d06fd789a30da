"""A plan as an SVG picture: layers by units, and one step's compute, transfers and stalls."""

from __future__ import annotations

from html import escape

import numpy as np

from orbitflow_sglang.planner.pipeline import Piece, trace
from orbitflow_sglang.planner.problem import Plan

WIDTH, LEFT, CELL_HEIGHT, LANE_HEIGHT = 960, 120, 16, 26
STEPS = 8  # before the one that is drawn: the pipeline has settled by then
INK, DEVICE, HOST, PAUSED, COMPUTE, LINK, STALL = (
    "#24292f", "#4c78a8", "#f58518", "#c9ced6", "#4c78a8", "#f58518", "#d62728",
)  # fmt: skip


def draw(plan: Plan) -> str:
    """The picture. A layer of which only a part is on the host is filled in proportion."""
    problem = plan.problem
    grid_top, rows = 100, len(problem.units)
    lanes_top = grid_top + rows * CELL_HEIGHT + 70
    height = lanes_top + 3 * LANE_HEIGHT + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _text(16, 26, _headline(plan), size=15),
        *_legend(48),
        _text(LEFT, grid_top - 8, f"layer 1 to {problem.layers}"),
        *_grid(plan, grid_top),
        _text(LEFT, lanes_top - 12, "one step of many in a row"),
        *_lanes(plan, lanes_top),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _headline(plan: Plan) -> str:
    problem = plan.problem
    return (
        f"{problem.mode}: {plan.status}. Step {plan.step_time_s * 1e3:.2f} ms, of which "
        f"{plan.stall_s * 1e3:.2f} ms stall; {plan.streamed_pages} pages streamed; arena "
        f"{plan.arena_pages_used} + ring {plan.ring_pages} of {problem.arena_pages} pages"
    )


def _legend(top: int) -> list[str]:
    found, left = [], 16
    for colour, name in ((DEVICE, "on the device"), (HOST, "on the host"), (PAUSED, "paused")):
        found += [_box(left, top, 12, 12, colour), _text(left + 18, top + 11, name)]
        left += 120
    return found


def _grid(plan: Plan, top: int) -> list[str]:
    problem = plan.problem
    cell = (WIDTH - LEFT - 16) / problem.layers
    parts = []
    for row, unit in enumerate(problem.units):
        y = top + row * CELL_HEIGHT
        name = unit.id if len(unit.id) <= 16 else unit.id[:15] + "…"
        parts.append(_text(LEFT - 8, y + 12, name, anchor="end"))
        for layer, pages in enumerate(plan.offloaded[row].tolist()):
            x, size = LEFT + layer * cell, CELL_HEIGHT - 2
            if plan.paused[row]:
                parts.append(_box(x, y, cell - 1, size, PAUSED))
                continue
            share = pages / max(1, unit.pages_at_end)
            if share < 1:
                parts.append(_box(x, y, cell - 1, size, DEVICE))
            if share > 0:
                parts.append(_box(x, y + size * (1 - share), cell - 1, size * share, HOST))
    return parts


def _lanes(plan: Plan, top: int) -> list[str]:
    begin, pieces = _one_step(plan)
    length = pieces[-1].end_s - begin
    scale = (WIDTH - LEFT - 16) / length

    def box(lane: int, start: float, end: float, colour: str) -> str:
        start, end = max(0.0, start - begin), min(length, end - begin)
        x, width = LEFT + start * scale, (end - start) * scale
        return _box(x, top + lane * LANE_HEIGHT, max(width - 0.5, 0.2), LANE_HEIGHT - 6, colour)

    names = ("compute", "H2D link", "stall")
    y = [top + lane * LANE_HEIGHT + 15 for lane in range(len(names))]
    parts = [_text(LEFT - 8, y[i], name, anchor="end") for i, name in enumerate(names)]
    computed = begin
    for piece in pieces:
        if piece.begin_s > begin - 1e-15:
            parts.append(box(0, piece.begin_s, piece.end_s, COMPUTE))
            if piece.begin_s > computed + 1e-12:
                parts.append(box(2, computed, piece.begin_s, STALL))
            computed = piece.end_s
        used = piece.pages * plan.problem.page_transfer_s
        if piece.link_end_s > begin and piece.pages and piece.link_end_s - used < begin + length:
            parts.append(box(1, piece.link_end_s - used, piece.link_end_s, LINK))
    parts.append(_text(LEFT, top + 3 * LANE_HEIGHT + 12, "0"))
    end = f"{length * 1e3:.2f} ms"
    parts.append(_text(WIDTH - 16, top + 3 * LANE_HEIGHT + 12, end, anchor="end"))
    return parts


def _one_step(plan: Plan) -> tuple[float, list[Piece]]:
    """When the step in the middle begins, and every piece of it and of the one behind."""
    problem = plan.problem
    streamed = plan.offloaded[~plan.paused]
    setup = problem.transfer_setup_s * (streamed > 0).sum(axis=0)
    pieces = trace(
        np.asarray(streamed.sum(axis=0)).tolist(), problem.layer_compute_s,
        problem.page_transfer_s, max(plan.ring_pages, 1), setup_s=setup.tolist(), steps=STEPS + 2,
    )  # fmt: skip
    begin = max(piece.end_s for piece in pieces if piece.step == STEPS - 1)
    inside = [piece for piece in pieces if piece.step == STEPS]
    # What the link brings ahead for the next step; it computes outside the picture.
    end, page_s = inside[-1].end_s, problem.page_transfer_s
    ahead = (p for p in pieces if p.step == STEPS + 1 and p.link_end_s - p.pages * page_s < end)
    shown = [p._replace(begin_s=-1.0, end_s=-1.0) for p in ahead]
    return begin, [*shown, *inside]


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(width, 0):.2f}" '
        f'height="{max(height, 0):.2f}" fill="{colour}"/>'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">'
        f"{escape(''.join(c if c.isprintable() else '?' for c in text))}</text>"
    )
