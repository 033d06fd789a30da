"""Figures of the simulated evaluation, readable in grey: PNG for pages, SVG for print.

``good_by_load`` and ``crossover`` show the committed runs. ``tbt_cdf`` and ``residency`` need more
than is kept of those: each is drawn from ``CDF``, simulated afresh by the code as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.sim import result
from eval.sim.campaign import Row
from eval.sim.engine import Simulation
from eval.sim.job import Job
from eval.sim.scenario import Scenario, simulation_of
from eval.sim.studies import method
from eval.sim.tables import difference, grouped, mean

mpl.use("Agg")
mpl.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "0"})
SHOWN = ("orbitflow@paced", "orbitflow", "time-sliced-swap@paced", "swap+order", "retract+order",
         "retract", "paper")  # fmt: skip
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
MARKS = "osD^v<>"
LABELS = {"retract": "stock SGLang (retract)", "paper": "the paper's rule (paper)"}
Grids = dict[str, dict[tuple[float, float], float]]  # title; SLO scale, link; points
CDF = Scenario("a5000-8b", "", mix="MIX", load=1.2, seed=101)


def draw(found: Mapping[str, Sequence[Row]], folder: Path) -> None:
    """Every figure that these runs have data for, and those that need none of them."""
    if found["mixes"]:
        _save(load_figure(found["mixes"]), folder / "good_by_load")
    if ahead := _ahead(found["crossover"]):
        _save(crossover_figure(ahead), folder / "crossover")
    _save(tbt_figure(), folder / "tbt_cdf")
    _save(residency_figure(), folder / "residency")


def load_figure(rows: Sequence[Row]) -> Figure:
    """Good requests against load, one panel for each mix."""
    by_mix: dict[str, list[Row]] = {}
    for row in rows:
        if row["scenario"]["arrivals"] == Scenario("", "").arrivals:
            by_mix.setdefault(row["scenario"]["mix"], []).append(row)
    figure = Figure(figsize=(3.0 * len(by_mix) + 1.5, 3.2), layout="constrained")
    axes: Sequence[Axes] = np.atleast_1d(figure.subplots(1, len(by_mix), sharey=True))
    for panel, (mix, of_mix) in zip(axes, sorted(by_mix.items()), strict=True):
        for name, line, mark in _styles():
            points = []
            for methods in grouped(of_mix).values():
                if name in methods:
                    load = next(iter(methods[name].values()))["scenario"]["load"]
                    points.append((load, 100 * mean(methods[name], "good_requests")))
            if points:
                panel.plot(*zip(*sorted(points), strict=True), linestyle=line, marker=mark,
                           markersize=4, color="black", label=LABELS.get(name, name))  # fmt: skip
        panel.set(title=mix, xlabel="load (multiple of what queueing drains)", ylim=(0, 100))
    axes[0].set_ylabel("good requests, %")
    lines, labels = axes[-1].get_legend_handles_labels()
    figure.legend(lines, labels, fontsize=7, loc="outside right")
    return figure


def tbt_figure() -> Figure:
    """Gaps between two tokens as they were delivered, over the target: a fresh simulation."""
    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    panel = figure.subplots()
    for name, line, _ in _styles():
        simulation = simulation_of(method(CDF, name))
        simulation.run()
        gaps = sorted(
            gap / (one.slo.tpot_s or 1.0) for one in result.served(simulation) for gap in one.gaps_s
        )
        share = np.arange(1, len(gaps) + 1) / len(gaps)
        panel.plot(gaps, 1 - share, linestyle=line, color="black", label=LABELS.get(name, name))
    panel.set(xscale="log", yscale="log", xlabel="gap between two tokens delivered / TPOT target",
              ylabel="share of gaps that are longer", ylim=(1e-4, 1), xlim=(0.3, 1e3))  # fmt: skip
    panel.axvline(1.0, color="grey", linewidth=0.8)
    panel.set_title(f"{CDF.mix} at load {CDF.load:g} on {CDF.profile}", fontsize=9)
    panel.legend(fontsize=7)
    return figure


class _Watched(Simulation):
    """Notes what each layer has on the host as time goes on."""

    def run(self) -> list[Job]:
        self.seen: list[tuple[float, np.ndarray, int]] = []
        return super().run()

    def _pass(self, seconds: float) -> None:
        super()._pass(seconds)
        jobs = [job for job in self._live.values() if job.view.phase in ("decode", "prefill")]
        hosts = [job.host for job in jobs if job.host is not None]
        loads = np.sum(hosts, axis=0) if hosts else np.zeros(self.machine.layers, np.int64)
        closed = sum(job.closed for job in jobs)
        self.seen.append((self.now, loads / max(1, closed), closed))


def residency_figure() -> Figure:
    """The share of the decoding requests' KV that is on the host, by layer and time: a fresh
    simulation."""
    simulation = simulation_of(method(CDF, "orbitflow"), kind=_Watched)
    assert isinstance(simulation, _Watched)
    simulation.run()
    end = simulation.now
    bins = 240
    image = np.zeros((simulation.machine.layers, bins))
    counts = np.zeros(bins)
    for now, share, _ in simulation.seen:
        column = min(bins - 1, int(now / end * bins))
        image[:, column] += share
        counts[column] += 1
    image /= np.maximum(1, counts)
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    panel = figure.subplots()
    shown = panel.imshow(100 * image, aspect="auto", origin="lower", cmap="Greys", vmin=0,
                         extent=(0, end, 0.5, simulation.machine.layers + 0.5))  # fmt: skip
    panel.set(xlabel="time, s", ylabel="layer")
    panel.grid(False)
    figure.colorbar(shown, label="KV on the host, %")
    return figure


def _ahead(rows: Sequence[Row]) -> Grids:
    """By title, what ours is ahead of the best of some others, in points, by SLO and link.

    Without those of which there are no runs.
    """
    panels = (
        ("over stock SGLang", ("retract",)),
        ("over the best of swap and slices", ("swap+order", "time-sliced-swap@paced")),
        ("streaming's share", ("orbitflow:no-streaming@paced",)),
    )
    found: Grids = {}
    for methods in grouped(rows).values():
        scenario = next(iter(next(iter(methods.values())).values()))["scenario"]
        if scenario["link_gb_per_s"] is None:
            continue
        where = scenario["slo_scale"], scenario["link_gb_per_s"]
        for title, others in panels:
            if {"orbitflow@paced", *others} <= methods.keys():
                found.setdefault(title, {})[where] = 100 * min(
                    difference(methods["orbitflow@paced"], methods[other], "good_requests").mean
                    for other in others
                )
    return found


def crossover_figure(ahead: Grids) -> Figure:
    """What ours is ahead of other methods that know no lengths, a panel for each title."""
    scales, links = (sorted({at[axis] for grid in ahead.values() for at in grid})
                     for axis in (0, 1))  # fmt: skip
    figure = Figure(figsize=(10 / 3 * len(ahead), 2.9), layout="constrained")
    axes: Sequence[Axes] = np.atleast_1d(figure.subplots(1, len(ahead), sharey=True))
    for panel, (title, grid) in zip(axes, ahead.items(), strict=True):
        image = np.full((len(scales), len(links)), np.nan)
        for (scale, link), value in grid.items():
            image[scales.index(scale), links.index(link)] = value
        shown = panel.imshow(image, aspect="auto", origin="lower", cmap="Greys", vmin=0)
        for (row, column), value in np.ndenumerate(image):
            if np.isnan(value):
                continue
            dark = value > 0.6 * np.nanmax(image)
            panel.text(column, row, f"{value:+.0f}", ha="center", va="center",
                       color="white" if dark else "black")  # fmt: skip
        panel.set(title=title, xlabel="link, GB/s", xticks=range(len(links)),
                  xticklabels=[f"{link:g}" for link in links], yticks=range(len(scales)),
                  yticklabels=[f"{scale:g}" for scale in scales])  # fmt: skip
        panel.grid(False)
        figure.colorbar(shown, ax=panel)
    axes[0].set_ylabel("TPOT target / full step")
    return figure


def _styles() -> list[tuple[str, object, str]]:
    return list(zip(SHOWN, LINES, cycle(MARKS), strict=False))


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=150, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
