"""The Grafana dashboard, the alerts and docs/metrics.md against the table of series."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orbitflow_sglang import series

pytestmark = pytest.mark.unit

DOCS = Path(__file__).resolve().parents[2] / "docs"
DASHBOARD = json.loads((DOCS / "grafana" / "orbitflow.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((DOCS / "grafana" / "alerts.yaml").read_text(encoding="utf-8"))
METRIC = re.compile(r"sglang:\w+")
# Of SGLang itself; tests/engine/test_series.py looks for them on a real server.
SGLANGS = {
    "sglang:time_to_first_token_seconds_bucket",
    "sglang:inter_token_latency_seconds_bucket",
    "sglang:num_running_reqs",
    "sglang:num_queue_reqs",
    "sglang:num_retracted_requests_total",
}


def values_of(key: str, node: Any) -> Iterator[Any]:
    """Every value of ``key`` anywhere in ``node``."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from values_of(key, value)
    elif isinstance(node, list):
        for value in node:
            yield from values_of(key, value)


def used_metrics() -> set[str]:
    texts = [*values_of("expr", DASHBOARD), *values_of("definition", DASHBOARD)]
    return {name for text in texts for name in METRIC.findall(text)}


def test_every_expression_uses_series_that_exist() -> None:
    assert used_metrics() - set(series.sample_names()) == SGLANGS


def test_every_series_is_drawn_or_only_for_a_closer_look() -> None:
    used = used_metrics()
    undrawn = {s.name for s in series.SERIES if not used & set(s.sample_names())}
    assert undrawn == {"placements_total"}


def test_every_expression_is_balanced_and_filtered() -> None:
    for expr in values_of("expr", DASHBOARD):
        for left, right in ("()", "[]", "{}"):
            assert expr.count(left) == expr.count(right), expr
        filters = expr.count('{model_name=~"$model_name", instance=~"$instance"')
        assert filters == len(METRIC.findall(expr)), expr


def test_a_label_is_compared_with_values_that_it_takes() -> None:
    labels = {s.label: s.values for s in series.SERIES if s.label}
    for expr in values_of("expr", DASHBOARD):
        for label, value in re.findall(r'(\w+)="([^"]+)"', expr):
            assert value in labels[label], expr


def test_alerts_are_about_the_series_that_the_guide_names() -> None:
    expressions = list(values_of("expr", ALERTS))
    used = {name for expr in expressions for name in METRIC.findall(expr)}
    assert used <= set(series.sample_names())
    guide = (DOCS / "operating.md").read_text(encoding="utf-8").partition("## What to be woken")[2]
    named = set(re.findall(r"\b[a-z]+_[a-z_]+\b", guide.partition("\n## ")[0]))
    assert {series.PREFIX + name for name in named} >= used
    for expr in expressions:
        for left, right in ("()", "[]", "{}"):
            assert expr.count(left) == expr.count(right), expr


def test_every_panel_reads_the_data_source_that_was_chosen() -> None:
    names = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    assert names == ["datasource", "model_name", "instance"]
    for panel in DASHBOARD["panels"]:
        if panel["type"] != "row":
            assert set(map(str, values_of("uid", panel))) == {"${datasource}"}, panel["title"]


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_names_follow_prometheus() -> None:
    names = [s.name for s in series.SERIES]
    assert len(set(names)) == len(names)
    for entry in series.SERIES:
        assert entry.name.endswith("_total") == (entry.kind == "counter"), entry
        assert (entry.label is None) == (not entry.values), entry


def test_the_documentation_has_a_row_for_each_series() -> None:
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    found = {row[1].strip().strip("`"): row[2].strip() for row in rows}
    expected = {s.name: s.kind + (f" `{s.label}`" if s.label else "") for s in series.SERIES}
    assert found == expected
