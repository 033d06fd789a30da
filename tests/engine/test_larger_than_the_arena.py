"""What the arena cannot hold: one long request, a wide batch, and what fits nowhere.

Where host memory runs short too, SGLang retracts requests and computes them again.

Sizes count all 4 layers of the model. The arena holds 256 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from servers import Stock, asked_of_stock, assert_nothing_is_left, orbitflow_args

from eval.client import Client, Request, RequestFailed, metric_sum
from eval.identity import assert_identical, mixed_requests
from eval.server import Server

STYLE = "qwen2"
ARENA_TOKENS = 256
HOST_GB = 0.01  # with the arena about 2,600 tokens


def prompts(count: int, tokens: int, new: int, seed: int) -> list[Request]:
    return mixed_requests(count, seed, shortest=tokens, longest=tokens, max_new_tokens=new)


LONG = prompts(1, 8 * ARENA_TOKENS, 24, seed=11)
WIDE = prompts(8, 4 * ARENA_TOKENS // 8, 48, seed=12)
GROWING = prompts(8, 256, 112, seed=15)  # 2,048 tokens of prompts, 2,944 in the end
BESIDE_LONG = prompts(1, 400, 24, seed=16)  # together 2,500
ALL = asked_of_stock(STYLE, [*LONG, *WIDE, *GROWING, *BESIDE_LONG])


@pytest.fixture(scope="module")
def server(stock: Stock) -> Iterator[Client]:
    stock.answers(STYLE, ALL)
    args = ["--orbitflow-arena-tokens", str(ARENA_TOKENS), "--page-size", "16"]
    args += ["--orbitflow-host-memory-gb", str(HOST_GB), "--orbitflow-policy", "static:1"]
    # SGLang then admits requests whose full outputs do not fit together.
    args += ["--schedule-conservativeness", "0.05"]
    with Server(orbitflow_args(STYLE, *args)) as running:
        yield running


def test_one_request_of_eight_arenas_completes(server: Client, stock: Stock) -> None:
    expected = stock.answers(STYLE, ALL)[:1]
    assert_identical(expected, server.generate_many(LONG, 1))
    assert_nothing_is_left(server)


def test_a_batch_of_four_arenas_decodes_together(server: Client, stock: Stock) -> None:
    before = decode_batch_sizes(server)
    answers = server.generate_batch(WIDE)
    steps = {size: n - before.get(size, 0) for size, n in decode_batch_sizes(server).items()}
    assert_identical(stock.answers(STYLE, ALL)[1:9], answers)
    # One after another would be 8 x 47 steps of one request each.
    assert steps[len(WIDE)] > 24, steps
    assert sum(steps.values()) < 2 * 48, steps
    assert_nothing_is_left(server)


def test_what_is_cached_gives_way_on_the_host_before_memory_is_full(
    server: Client, stock: Stock
) -> None:
    server.generate_many(LONG, 1)
    before = evicted_tokens(server)
    answers = server.generate_many(BESIDE_LONG, 1)
    assert_identical(stock.answers(STYLE, ALL)[17:], answers)
    # SGLang itself had room for both.
    assert evicted_tokens(server) > before
    assert_nothing_is_left(server)


def test_retracted_requests_end_with_their_tokens(server: Client, stock: Stock) -> None:
    # Where outputs may end early, which these do not, SGLang reserves little for those
    # that run, though all for those that it admits: the last ones come in behind the others.
    answers = server.generate_batch(GROWING, ignore_eos=False)
    assert_identical(stock.answers(STYLE, ALL)[9:17], answers)
    assert metric_sum(server.metrics(), "sglang:num_retracted_requests_total") > 0
    assert_nothing_is_left(server)


def test_a_prompt_that_fits_nowhere_is_refused_while_others_go_on(
    server: Client, stock: Stock
) -> None:
    (too_long,) = prompts(1, 3_000, 4, seed=13)
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(server.generate_many, WIDE, len(WIDE))
        with pytest.raises(RequestFailed, match="3000") as refusal:
            server.generate(too_long.input_ids, 4)
        assert refusal.value.status == 400
        assert_identical(stock.answers(STYLE, ALL)[1:9], others.result())
    assert_nothing_is_left(server)


def test_max_tokens_is_clipped_to_what_fits(server: Client) -> None:
    (state,) = server.orbitflow()
    assert state is not None
    capacity = state["logical_pages"] * state["page_size"]
    (request,) = prompts(1, capacity - 100, 10_000, seed=14)
    answer = server.generate(request.input_ids, request.max_new_tokens)
    assert 0 < len(answer.output_ids) < 100
    assert answer.finish_reason == "length"
    assert_nothing_is_left(server)


def evicted_tokens(server: Client) -> float:
    # SGLang has no such series before it has evicted anything.
    return sum(one.value for one in server.metrics().get("sglang:evicted_tokens_total", ()))


def decode_batch_sizes(server: Client) -> dict[int, int]:
    (state,) = server.orbitflow()
    assert state is not None
    return {int(size): steps for size, steps in state["decode_batch_sizes"].items()}
