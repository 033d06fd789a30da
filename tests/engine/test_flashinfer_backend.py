"""The backend for GPUs in the real engine on the CPU, with PyTorch in FlashInfer's place.

Everything but the kernels is what a GPU runs: plans, page indices of each layer, parts and their
merging, the copy of the table of pages, the overlap scheduler, and decode steps from SGLang's
graphs in pieces, of up to four requests, with calls made again in a CUDA graph's place.
``tests/gpu`` has the kernels too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from servers import (
    FULL,
    POLICIES,
    TEST_CONTROL,
    Stock,
    assert_corruption_is_noticed,
    assert_identical_to_stock,
    assert_nothing_is_left,
    in_full_only,
    orbitflow_args,
    workload,
)

from eval.client import Request
from eval.identity import Comparison, compare
from eval.server import Server

FAKE = Path(__file__).parents[1] / "fake_flashinfer"
CHOSEN = POLICIES if FULL else ("all-host", "random:1")
COMMON = (
    *("--attention-backend", "orbitflow_flashinfer"),
    *("--orbitflow-host-memory-gb", "0.5", "--page-size", "16", "--chunked-prefill-size", "256"),
)
GRAPHS = (
    *("--cuda-graph-backend-decode", "breakable", "--cuda-graph-bs-decode", "1", "4"),
    *("--decode-log-interval", "1"),
)
ENV = {**TEST_CONTROL, "PYTHONPATH": str(FAKE)}


@pytest.fixture(scope="module")
def server(stock: Stock) -> Iterator[Server]:
    stock.answers("llama", workload("llama"))  # one server at a time
    args = orbitflow_args(
        "llama", *COMMON, "--orbitflow-arena-tokens", "1024", "--orbitflow-policy", "static:1",
        "--orbitflow-ring-pages", "40", *GRAPHS,
    )  # fmt: skip
    with Server(args, env={**ENV, "FAKE_CUDA_GRAPHS": "1"}) as started:
        yield started


@pytest.mark.parametrize("policy", CHOSEN)
def test_tokens_are_those_of_stock_sglang(
    server: Server, policy: str, stock: Stock, identity_cells: dict[str, Comparison]
) -> None:
    result = assert_identical_to_stock(server, stock, "llama", policy)
    identity_cells[f"{policy} flashinfer's place taken"] = result


def test_a_corrupted_page_is_noticed(server: Server, stock: Stock) -> None:
    assert_corruption_is_noticed(server, stock, "llama")


def test_steps_come_from_graphs_up_to_the_largest_captured(server: Server) -> None:
    """Of one request, of some that are padded to four, and of more than four beside graphs."""
    begun = len(server.log.read_text("utf-8"))
    for together in (1, 3, 6):
        wanted = [Request(f"{together}-{i}", tuple(range(40, 60)), 40) for i in range(together)]
        server.generate_many(wanted, together)
    text = server.log.read_text("utf-8")[begun:]
    steps = re.findall(r"Decode batch, #running-req: (\d+).*cpu graph: (\w+)", text)
    drawn = {int(size): graph for size, graph in steps}
    assert {1, 3, 6} <= drawn.keys(), drawn
    assert drawn == {size: str(size <= 4) for size in drawn}


def test_a_step_that_was_announced_is_prepared_without_a_look_at_its_batch() -> None:
    """Whose tensors lie on the device, behind the steps that still run there."""
    from orbitflow_sglang.engine import graphs, pool, runtime

    class Backend(graphs.BetweenGraphs):
        def begin(self, step: object) -> None:
            begun.append(step)

        decode = extend = None  # type: ignore[assignment]

    begun: list[object] = []
    backend = Backend()
    backend.token_to_kv_pool = object.__new__(pool.OrbitFlowKVPool)
    step = runtime.StepInput([1], [20], None, np.array([19]))
    backend.token_to_kv_pool.runtime = SimpleNamespace(coming=step)  # type: ignore[attr-defined]
    backend.init_forward_metadata(object())  # type: ignore[arg-type]
    backend.init_forward_metadata_out_graph(SimpleNamespace(batch_size=4, num_padding=3))
    assert begun == [step, step]
    with pytest.raises(RuntimeError, match="a step of 4 requests, announced with 1"):
        backend.init_forward_metadata_out_graph(SimpleNamespace(batch_size=4, num_padding=0))


@in_full_only
def test_the_controller_measures_and_serves_more_than_fits(
    stock: Stock, identity_cells: dict[str, Comparison], tmp_path: Path
) -> None:
    """Runs last in this file: with a server of its own, whose costs are not known from earlier."""
    wanted = workload("llama")
    expected = stock.answers("llama", wanted)
    args = orbitflow_args("llama", *COMMON, "--orbitflow-arena-tokens", "2048")
    with Server(args, env={**ENV, "ORBITFLOW_CACHE_DIR": str(tmp_path)}) as ours:
        result = compare(expected, ours.generate_many(wanted, 16))
        (state,) = ours.orbitflow()
        assert_nothing_is_left(ours)
    identity_cells["orbitflow flashinfer's place taken"] = result
    assert not result.failures, result
    assert state is not None and state["profile"]["source"] == "measured"
    assert state["control"]["pauses"] + state["tiered_steps"] > 0, "nothing was ever short"
