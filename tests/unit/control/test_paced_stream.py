"""Paced delivery of a stream of chunks as SGLang makes them, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest

from orbitflow_sglang.control.paced_stream import Chunk, paced
from orbitflow_sglang.slo import SLO

pytestmark = pytest.mark.unit

SECOND_TOKEN_S = 0.95  # with a pace of 1 s


class VirtualLoop(asyncio.SelectorEventLoop):
    """Where nothing can run, time jumps to the next timer; a loop without either has hung."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 100.0

    def time(self) -> float:
        return self.now_s

    def _run_once(self) -> None:
        if not self._ready:  # type: ignore[attr-defined]
            timers = [timer for timer in self._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
            assert timers, "nothing will ever happen again"
            self.now_s = max(self.now_s, min(timer.when() for timer in timers))
        super()._run_once()  # type: ignore[misc]


def run(scenario: Callable[[VirtualLoop], Coroutine[Any, Any, None]]) -> None:
    loop = VirtualLoop()
    try:
        loop.run_until_complete(scenario(loop))
        left = asyncio.all_tasks(loop)
        assert left == set()
    finally:
        loop.close()


@dataclass
class Source:
    """A request: steps of (seconds to wait, new tokens); its lists grow as SGLang's do."""

    steps: list[tuple[float, int]]
    incremental: bool = False
    error: Exception | None = None
    silent_s: float = 0.0  # between the last chunk and the end
    text: str = ""
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, int, None]] = field(default_factory=list)
    closed: bool = False

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        try:
            for index, (wait_s, tokens) in enumerate(self.steps):
                await asyncio.sleep(wait_s)
                yield self.chunk(tokens, last=index == len(self.steps) - 1 and self.error is None)
            if self.silent_s:
                await asyncio.sleep(self.silent_s)
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True

    def chunk(self, tokens: int, *, last: bool) -> Chunk:
        new = range(len(self.output_ids), len(self.output_ids) + tokens)
        text = "".join(f"<{token}>" for token in new)
        self.text += text
        self.output_ids += new
        self.logprobs += [(-0.5 * token, token, None) for token in new]
        meta_info: dict[str, Any] = {
            "finish_reason": {"type": "length"} if last else None,
            "completion_tokens": len(self.output_ids),
            "input_token_logprobs": [(None, 7, None)],
        }
        if self.incremental:
            meta_info["output_token_logprobs"] = self.logprobs[len(self.logprobs) - tokens :]
            return {"text": text, "output_ids": list(new), "meta_info": meta_info}
        meta_info["output_token_logprobs"] = self.logprobs
        ids = self.output_ids.copy() if last else self.output_ids
        return {"text": self.text, "output_ids": ids, "meta_info": meta_info}


@dataclass
class Got:
    at_s: float
    chunk: Chunk
    tokens: int


def stream(
    loop: VirtualLoop, source: Source, slo: SLO, received: list[int] | None = None
) -> AsyncGenerator[tuple[Chunk, int], None]:
    def note(chunk: Chunk, tokens: int) -> None:
        if received is not None:
            received.append(tokens)

    return paced(
        source.chunks(),
        lambda: slo,
        lambda: source.text,
        incremental=source.incremental,
        received=note,
        clock=loop.time,
    )


async def read(
    loop: VirtualLoop, source: Source, slo: SLO, received: list[int] | None = None
) -> list[Got]:
    return [
        Got(loop.time() - 100.0, chunk, tokens)
        async for chunk, tokens in stream(loop, source, slo, received)
    ]


FAST = [(0.5, 1)] + [(0.1, 1)] * 29  # 30 tokens within 3.4 s
PACED = SLO(tpot_s=1.0)


def test_while_ahead_tokens_leave_at_the_pace_and_all_at_the_end() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        received: list[int] = []
        got = await read(loop, Source(FAST), PACED, received)
        assert received == list(range(1, 31))
        assert [item.tokens for item in got] == [1, 2, 3, 4, 30]
        times = [0.5, 0.5 + 0.95, 0.5 + 1.9, 0.5 + 2.85, 3.4]
        assert [item.at_s for item in got] == pytest.approx(times)

    run(scenario)


def test_each_chunk_leaves_as_it_came_though_lists_and_text_have_grown() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        source = Source(FAST)
        for item in await read(loop, source, PACED):
            ids = list(range(item.tokens))
            assert item.chunk["output_ids"] == ids
            assert item.chunk["text"] == "".join(f"<{token}>" for token in ids)
            meta_info = item.chunk["meta_info"]
            assert meta_info["output_token_logprobs"] == [(-0.5 * t, t, None) for t in ids]
            assert meta_info["input_token_logprobs"] == [(None, 7, None)]
            assert meta_info["completion_tokens"] == item.tokens
            assert bool(meta_info["finish_reason"]) == (item.tokens == 30)

    run(scenario)


def test_chunks_of_an_incremental_stream_all_leave_unchanged_and_in_order() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        got = await read(loop, Source(FAST, incremental=True), PACED)
        assert [item.tokens for item in got] == list(range(1, 31))
        assert [item.chunk["output_ids"] for item in got] == [[token] for token in range(30)]
        assert [item.chunk["text"] for item in got] == [f"<{token}>" for token in range(30)]
        assert [len(item.chunk["meta_info"]["output_token_logprobs"]) for item in got] == [1] * 30
        assert [item.at_s for item in got[:4]] == pytest.approx([0.5, 1.45, 2.4, 3.35])
        assert all(item.at_s == pytest.approx(3.4) for item in got[4:])

    run(scenario)


def test_a_token_that_comes_later_than_due_leaves_at_once() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        got = await read(loop, Source([(0.5, 1), (3.0, 1), (0.1, 1), (0.1, 1), (2.0, 1)]), PACED)
        assert [item.tokens for item in got] == [1, 2, 3, 4, 5]
        assert [item.at_s for item in got] == pytest.approx([0.5, 3.5, 3.6, 3.7, 5.7])

    run(scenario)


def test_a_chunk_of_several_tokens_leaves_when_its_first_one_is_due() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        got = await read(loop, Source([(0.0, 1), (0.1, 4), (0.1, 1), (9.0, 1)]), PACED)
        assert [item.tokens for item in got] == [1, 5, 6, 7]
        assert [item.at_s for item in got] == pytest.approx([0.0, 0.95, 5 * 0.95, 9.2])

    run(scenario)


def test_a_chunk_without_new_tokens_neither_waits_nor_starts_the_clock() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        got = await read(loop, Source([(0.0, 0), (2.0, 1), (0.1, 0), (0.1, 1), (5, 1)]), PACED)
        assert [(item.tokens, round(item.at_s, 3)) for item in got] == [
            (0, 0.0), (1, 2.0), (1, 2.1), (2, 2.95), (3, 7.2),
        ]  # fmt: skip

    run(scenario)


def test_without_a_pace_every_chunk_leaves_as_it_comes() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        got = await read(loop, Source(FAST), SLO(ttft_s=1.0))
        assert [item.tokens for item in got] == list(range(1, 31))
        assert got[-2].at_s == pytest.approx(3.3)

    run(scenario)


def test_an_error_comes_behind_what_was_there_before_it() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        source = Source(FAST[:5], error=ValueError("disconnected"))
        tokens = []
        with pytest.raises(ValueError, match="disconnected"):
            async for _, count in stream(loop, source, PACED):
                tokens.append(count)
        assert tokens == [1, 5]
        assert source.closed

    run(scenario)


@pytest.mark.parametrize("error", [None, ValueError("disconnected")])
def test_an_end_behind_all_tokens_is_passed_on(error: ValueError | None) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        source = Source([(0.5, 1)] * 2, error=error, silent_s=9.0)  # the reader has them by then
        tokens = []
        with nullcontext() if error is None else pytest.raises(ValueError, match="disconnected"):
            async for _, count in stream(loop, source, PACED):
                tokens.append(count)
        assert tokens == [1, 2] and loop.time() == pytest.approx(110.0)

    run(scenario)


@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_closing_the_stream_ends_the_source(chunks: int) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        source = Source(FAST)
        delivered = stream(loop, source, PACED)
        for _ in range(chunks):
            await anext(delivered)
        await delivered.aclose()
        assert source.closed == (chunks > 0)  # what never began has nothing to end
        assert len(source.output_ids) < 30

    run(scenario)


@pytest.mark.parametrize("after_s", [0.2, 1.0, 2.0])
def test_cancelling_the_reader_ends_the_source(after_s: float) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        source = Source(FAST)
        reader = asyncio.create_task(read(loop, source, PACED))
        await asyncio.sleep(after_s)
        while not reader.done():  # more than once: web servers do so, too
            reader.cancel()
            await asyncio.sleep(0)
        assert reader.cancelled()
        await asyncio.sleep(0)
        assert source.closed
        assert len(source.output_ids) < 30

    run(scenario)


def test_a_slow_reader_does_not_hold_up_the_source() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        source, tokens = Source(FAST), []
        async for _, count in stream(loop, source, PACED):
            tokens.append(count)
            await asyncio.sleep(2.0)
        assert tokens == [1, 3, 30]

    run(scenario)
