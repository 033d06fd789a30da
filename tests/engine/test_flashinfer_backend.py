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
from typing import Any

import numpy as np
import pytest
from servers import (
    FAKE_FLASHINFER,
    FULL,
    POLICIES,
    TEST_CONTROL,
    Stock,
    assert_corruption_is_noticed,
    assert_identical_to_stock,
    assert_nothing_is_left,
    compare_with_stock,
    in_full_only,
    orbitflow_args,
    workload,
)

from eval.client import Request
from eval.identity import Comparison, compare
from eval.server import Server

CHOSEN = POLICIES if FULL else ("all-host", "random:1")
COMMON = (
    *("--attention-backend", "orbitflow_flashinfer"),
    *("--orbitflow-host-memory-gb", "0.5", "--page-size", "16", "--chunked-prefill-size", "256"),
)
GRAPHS = (
    *("--cuda-graph-backend-decode", "breakable", "--cuda-graph-bs-decode", "1", "4"),
    *("--decode-log-interval", "1"),
)
ENV = {**TEST_CONTROL, **FAKE_FLASHINFER}


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
    result = compare_with_stock(server, stock, "llama", policy)
    identity_cells[f"{policy} flashinfer's place taken"] = result
    assert_identical_to_stock(server, result)


def test_a_corrupted_page_is_noticed(server: Server, stock: Stock) -> None:
    assert_corruption_is_noticed(server, stock, "llama")


def test_steps_come_from_graphs_up_to_the_largest_captured(server: Server) -> None:
    """Of one request, of some that are padded to four, and of more than four beside graphs."""
    begun = len(server.log.read_text("utf-8"))
    for together in (1, 3, 6):  # long enough to decode together though they do not arrive so
        wanted = [Request(f"{together}-{i}", tuple(range(40, 60)), 240) for i in range(together)]
        server.generate_many(wanted, together)
    text = server.log.read_text("utf-8")[begun:]
    steps = re.findall(r"Decode batch, #running-req: (\d+).*cpu graph: (\w+)", text)
    drawn = {int(size): graph for size, graph in steps}
    assert 1 in drawn and drawn.keys() & {2, 3} and max(drawn) > 4, drawn
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


def test_what_kv_of_8_bits_was_divided_by_is_heeded_when_it_is_read() -> None:
    import torch

    from orbitflow_sglang.engine.attention_flashinfer import OrbitFlowFlashInferBackend

    backend: Any = object.__new__(OrbitFlowFlashInferBackend)
    backend._runtime = SimpleNamespace(passes=lambda layer_id: ())
    backend._attention = SimpleNamespace(
        decode=lambda q, parts, scale: q * scale,
        extend=lambda q, k, v, parts, scale: q * scale + v,
    )
    layer: Any = SimpleNamespace(
        layer_id=0, scaling=0.25, tp_k_head_num=1, tp_v_head_num=1, qk_head_dim=2, v_head_dim=2,
        k_scale=torch.tensor(0.5), k_scale_float=0.5, v_scale=4.0, v_scale_float=None,
        tp_q_head_num=1, is_cross_attention=False, attn_type="decoder",
    )  # fmt: skip
    q, new = torch.ones(1, 1, 2), torch.tensor([[1.0, 2.0]])
    for dtype, k, v, out in (
        (torch.float8_e4m3fn, [2.0, 4.0], [0.25, 0.5], [0.125 * 4, 0.125 * 4]),
        (torch.bfloat16, [1.0, 2.0], [1.0, 2.0], [0.25, 0.25]),
    ):
        backend.token_to_kv_pool = SimpleNamespace(dtype=dtype)
        stored = backend._stored(new, new, layer)
        assert [x.dtype for x in stored] == [dtype] * 2
        assert [x.float().tolist() for x in stored] == [[[k]], [[v]]]
        assert backend.decode(q, layer).tolist() == [[out]]
        factor = 4.0 if dtype.itemsize == 1 else 1.0
        read = backend.extend(q, None, stored[1].float(), layer)
        assert read.tolist() == [[[a + b * factor for a, b in zip(out, v, strict=True)]]]
    # New tokens attend to what will be read back: 1.1 / 4, in 8 bits 0.28125, times 4.
    backend.token_to_kv_pool = SimpleNamespace(dtype=torch.float8_e4m3fn)
    new = torch.full((1, 2), 1.1)
    seen = backend.forward_extend(q.flatten(1), new, new, layer, None, save_kv_cache=False)
    assert seen.tolist() == [[0.125 * 4 + 1.125] * 2]


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
