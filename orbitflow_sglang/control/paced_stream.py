"""Token deposit: a stream of SGLang's chunks, read as fast as it comes and passed on at a pace.

A chunk that is not incremental holds all tokens so far. Its lists and its text are those
of the request, which go on growing, so a chunk that waits keeps their lengths and is cut
to them when it leaves. That also keeps a long backlog small: a copy of each would take
memory quadratic in the number of tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from orbitflow_sglang.control.deposit import Pacer
from orbitflow_sglang.slo import SLO

Chunk = dict[str, Any]
Clock = Callable[[], float]
Received = Callable[[Chunk, int], None]  # a chunk has come; the tokens so far


def finishes(chunk: Chunk) -> bool:
    """Whether ``chunk`` is a request's last one."""
    return bool(chunk["meta_info"].get("finish_reason"))


@dataclass(frozen=True, slots=True)
class Waiting:
    """One chunk in the deposit. ``first`` is its first new token, ``tokens`` those so far."""

    chunk: Chunk
    first: int
    tokens: int
    lengths: dict[str, int] | None = None  # of what may grow; None: nothing does
    meta_lengths: dict[str, int] | None = None

    def cut(self, text_so_far: Callable[[], str]) -> Chunk:
        """The chunk as it was when it came."""
        if self.lengths is None or self.meta_lengths is None:
            return self.chunk
        grown: Chunk = {"meta_info": _cut(self.chunk["meta_info"], self.meta_lengths)}
        if "text" in self.lengths:
            grown["text"] = text_so_far()
        return _cut({**self.chunk, **grown}, self.lengths)


def _cut(values: dict[str, Any], lengths: dict[str, int]) -> dict[str, Any]:
    return {
        key: value[: lengths[key]] if key in lengths else value for key, value in values.items()
    }


def _lengths(values: dict[str, Any]) -> dict[str, int]:
    # What describes the prompt is complete before the first token.
    return {
        key: len(value)
        for key, value in values.items()
        if isinstance(value, list) and not key.startswith(("input_", "prompt_"))
    }


class _Deposit:
    """Chunks that came and have not left yet, and the task that fetches them."""

    def __init__(
        self, source: AsyncGenerator[Chunk, None], incremental: bool, received: Received
    ) -> None:
        self.waiting: deque[Waiting] = deque()
        self.changed = asyncio.Event()
        self.ended = asyncio.Event()
        self.error: Exception | None = None
        self._source = source
        self._incremental = incremental
        self._received = received
        self._tokens = 0
        self._task = asyncio.create_task(self._fetch())

    async def _fetch(self) -> None:
        try:
            async with aclosing(self._source):
                async for chunk in self._source:
                    self._keep(chunk)
                    self.changed.set()
        except Exception as error:  # raised again where the chunks are passed on
            self.error = error
        finally:
            self.ended.set()
            self.changed.set()

    def _keep(self, chunk: Chunk) -> None:
        before = self._tokens
        self._tokens = tokens_so_far(chunk, before, self._incremental)
        self._received(chunk, self._tokens)
        lengths = meta_lengths = None
        if not self._incremental and not finishes(chunk):
            lengths, meta_lengths = _lengths(chunk), _lengths(chunk["meta_info"])
            if isinstance(text := chunk.get("text"), str):
                lengths["text"] = len(text)
                chunk = {**chunk, "text": None}
        first = min(before + 1, self._tokens)  # a chunk without tokens is not held up
        self.waiting.append(Waiting(chunk, first, self._tokens, lengths, meta_lengths))

    def take(self, pacer: Pacer, now_s: float) -> list[Waiting]:
        """Removes what may leave. A chunk with all tokens so far makes those before it needless."""
        taken: list[Waiting] = []
        while self.waiting:
            item = self.waiting[0]
            if not self.ended.is_set() and item.first > pacer.deliverable(self._tokens, now_s):
                break
            if item.tokens:
                pacer.delivered(now_s)
            taken.append(self.waiting.popleft())
        return taken if self._incremental else taken[-1:]

    async def close(self) -> None:
        """Ends the task, which closes the source, as nobody else may while it reads.

        A server cancels a reader again and again until it is gone. That may end the wait
        here, but not the task.
        """
        self._task.cancel()
        await asyncio.wait([self._task])


def tokens_so_far(chunk: Chunk, before: int, incremental: bool) -> int:
    """Output tokens up to and with ``chunk``, of which ``before`` came earlier."""
    ids = chunk.get("output_ids")
    if ids is None:  # beam search
        return max(before, int(chunk["meta_info"].get("completion_tokens", 0)))
    return before + len(ids) if incremental else max(before, len(ids))


async def paced(
    source: AsyncGenerator[Chunk, None],
    slo: Callable[[], SLO],
    text_so_far: Callable[[], str],
    *,
    incremental: bool,
    received: Received,
    clock: Clock = time.perf_counter,
) -> AsyncGenerator[tuple[Chunk, int], None]:
    """Passes the chunks of ``source`` on at the SLO's pace, each with the tokens up to it.

    The first one leaves at once, everything that is left leaves when the source ends or
    fails. A chunk of several tokens cannot be split; it leaves when the first of them is
    due, because waiting for the last would deliver the others late, and early tokens harm
    nobody. ``slo`` is asked when the first chunk is there; ``received`` is called with each
    chunk and its tokens as it comes.
    """
    deposit = _Deposit(source, incremental, received)
    pacer: Pacer | None = None
    try:
        while True:
            await deposit.changed.wait()
            deposit.changed.clear()
            if pacer is None:
                pacer = Pacer(slo())
            while deposit.waiting:
                await _until_due(pacer.due_s(deposit.waiting[0].first), deposit.ended, clock)
                for item in deposit.take(pacer, clock()):
                    yield item.cut(text_so_far), item.tokens
            if deposit.ended.is_set():
                break
        if deposit.error is not None:
            raise deposit.error
    finally:
        await deposit.close()


async def _until_due(due_s: float, ended: asyncio.Event, clock: Clock) -> None:
    """Returns at ``due_s``, or when nothing more will come."""
    while not ended.is_set() and (wait_s := due_s - clock()) > 0:
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await ended.wait()
