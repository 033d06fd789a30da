"""Token identity with stock SGLang, over every policy and kind of server.

Six servers cover each pair of page size, overlap, chunk size and model style; each
policy meets every value of every axis on three of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from servers import (
    FULL,
    POLICIES,
    TEST_CONTROL,
    Stock,
    asked_of_stock,
    assert_corruption_is_noticed,
    assert_identical_to_stock,
    assert_nothing_is_left,
    compare_with_stock,
    orbitflow_args,
    workload,
)

from eval.client import Client
from eval.identity import Comparison
from eval.server import Server


@dataclass(frozen=True)
class Setting:
    """One server. Its arena is far smaller than what runs on it."""

    style: str
    page_size: int
    overlap: bool
    chunk: int | None  # tokens; None: SGLang's default, more than any prompt here
    ring: int | None = None  # pages; None: the default

    @property
    def name(self) -> str:
        overlap = "overlap" if self.overlap else "no-overlap"
        return f"{self.style}-page{self.page_size}-{overlap}-chunk{self.chunk or 'default'}"

    def args(self) -> list[str]:
        extra = ["--orbitflow-arena-tokens", "1024", "--orbitflow-host-memory-gb", "0.5"]
        extra += ["--orbitflow-policy", "static:1", "--page-size", str(self.page_size)]
        if not self.overlap:
            extra.append("--disable-overlap-schedule")
        if self.chunk is not None:
            extra += ["--chunked-prefill-size", str(self.chunk)]
        if self.ring is not None:
            extra += ["--orbitflow-ring-pages", str(self.ring)]
        return orbitflow_args(self.style, *extra)


SETTINGS = (
    Setting("qwen2", 16, False, None),
    Setting("qwen2", 1, True, 256),
    Setting("qwen3", 1, False, 256, ring=100),
    Setting("qwen3", 16, True, None),
    Setting("llama", 1, False, None),
    Setting("llama", 16, True, 256, ring=12),
)
IN_EVERY_RUN = (1, 5)  # with them every policy
CELLS = [
    (setting, policy)
    for i, setting in enumerate(SETTINGS)
    for j, policy in enumerate(POLICIES)
    if (j % 2 == 0) == (i in (0, 2, 5)) and (FULL or i in IN_EVERY_RUN)
]
for style in {setting.style for setting, _ in CELLS}:
    asked_of_stock(style, workload(style))


class Current:
    """The server that runs: one at a time, and as long as tests of its setting follow."""

    def __init__(self, stock: Stock) -> None:
        self._stock = stock
        self._setting: Setting | None = None
        self._server: Server | None = None

    def use(self, setting: Setting) -> Client:
        if self._server is None or self._setting != setting:
            self.stop()
            self._stock.answers(setting.style, workload(setting.style))
            server = Server(setting.args(), env=TEST_CONTROL)
            server.start()
            self._setting, self._server = setting, server
        return self._server

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


@pytest.fixture(scope="module")
def current(stock: Stock) -> Iterator[Current]:
    servers = Current(stock)
    yield servers
    servers.stop()


@pytest.mark.parametrize(
    ("setting", "policy"), CELLS, ids=[f"{setting.name}-{policy}" for setting, policy in CELLS]
)
def test_tokens_are_those_of_stock_sglang(
    current: Current,
    setting: Setting,
    policy: str,
    stock: Stock,
    identity_cells: dict[str, Comparison],
) -> None:
    server = current.use(setting)
    result = compare_with_stock(server, stock, setting.style, policy)
    identity_cells[f"{policy} {setting.name}"] = result
    assert_identical_to_stock(server, result)


def test_a_corrupted_page_is_noticed(current: Current, stock: Stock) -> None:
    setting = SETTINGS[-1]
    assert_corruption_is_noticed(current.use(setting), stock, setting.style)


def test_where_everything_fits_there_are_no_tables_and_no_transfers(
    current: Current, stock: Stock, identity_cells: dict[str, Comparison]
) -> None:
    """The default policy on an arena that holds all."""
    stock.answers("llama", workload("llama"))
    current.stop()
    args = orbitflow_args("llama", "--max-total-tokens", "16384")
    with Server(args) as server:
        result = compare_with_stock(server, stock, "llama")
        identity_cells["orbitflow llama, everything fits"] = result
        assert not result.failures, result
        (state,) = server.orbitflow()
        assert state is not None
        assert state["policy"] == "orbitflow"
        assert state["steps"] > 0
        assert state["tiered_steps"] == 0
        assert state["h2d"]["bytes"] == state["d2h"]["bytes"] == 0
        assert_nothing_is_left(server)


def test_ties_are_rare(identity_cells: dict[str, Comparison]) -> None:
    """At most 1 % over all cells of this run; runs last in this file."""
    if not identity_cells:
        pytest.skip("no cell was run")
    total = sum(identity_cells.values(), Comparison())
    assert not total.too_many_ties, total
