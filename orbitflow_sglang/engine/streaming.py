"""Hooks on how answers leave the server: paced delivery, and what the client got against its SLO.

The last chunk of every generation has ``meta_info["orbitflow"]``:

    {"slo": {"ttft_s": 0.8, "tpot_s": 0.05, "tbt_s": null, "assumed": false},
     "generated": {"ttft_s": 0.31, "tpot_s": 0.021, "max_tbt_s": 0.09, "violations": 0},
     "delivered": {"ttft_s": 0.32, "tpot_s": 0.047, "max_tbt_s": 0.05, "violations": 0},
     "pauses": 0, "deposit_tokens": 87.5}

``generated`` is the scheduler's view, and where it sends none what this process received;
``delivered`` is when chunks of a stream left. A request that does not stream gets all at
its end and nobody waits for its tokens one by one: there ``delivered`` is ``generated``,
and what only the scheduler knows is null where it sends nothing.

The scheduler sends its part as ``req.time_stats.orbitflow``, any of the keys ``slo`` (with
``assumed``), ``generated``, ``pauses`` and ``deposit_tokens``, with any output; later keys
replace earlier ones. Targets that only it knows (``--orbitflow-slo-scale``) are used here
from the moment they arrive: sent with the first output, they also pace what is paced.
"""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput, unwrap_from_pickle

from orbitflow_sglang.config import OrbitFlowConfig
from orbitflow_sglang.control.deposit import Attainment, TokenTimes
from orbitflow_sglang.control.paced_stream import Chunk, finishes, paced, tokens_so_far
from orbitflow_sglang.engine.metrics import count_delivered
from orbitflow_sglang.engine.requests import custom_params_of
from orbitflow_sglang.slo import SLO, request_slo

KEY = "orbitflow"  # in meta_info, and the attribute of SGLang's objects that carry our part


# --- from the scheduler to here -----------------------------------------------


def time_stats_state(state: dict[str, Any], stats: Any) -> dict[str, Any]:
    """After ``SchedulerReqTimeStats.__getstate__``: our part, with metrics on or off."""
    part = getattr(stats, KEY, None)
    return state if part is None else {**state, KEY: part}


async def handle_batch_output(
    original: Callable[..., Any], manager: Any, output: Any, *args: Any
) -> None:
    """Around ``TokenizerManager._handle_batch_output``: the scheduler's part, to its request.

    Before, because the original forgets requests that have finished. It unwraps again
    what is unwrapped here, which changes nothing.
    """
    output.time_stats = unwrap_from_pickle(output.time_stats)
    for rid, stats in zip(output.rids, output.time_stats or (), strict=False):
        part = getattr(stats, KEY, None)
        if part is not None and (state := manager.rid_to_state.get(rid)) is not None:
            setattr(state, KEY, getattr(state, KEY, {}) | part)
    await original(manager, output, *args)


# --- from here to the client --------------------------------------------------


def stream_one_response(
    original: Callable[..., AsyncGenerator[Chunk, None]],
    manager: Any,
    obj: Any,
    state: Any,
    request: Any = None,
) -> AsyncGenerator[Chunk, None]:
    """Around ``TokenizerManager._stream_one_response``: the answer of one request, in chunks."""
    chunks = original(manager, obj=obj, state=state, request=request)
    if not isinstance(obj, GenerateReqInput):
        return chunks
    return _delivered(chunks, _Delivery(manager, obj, state))


async def _delivered(
    chunks: AsyncGenerator[Chunk, None], delivery: _Delivery
) -> AsyncGenerator[Chunk, None]:
    async with aclosing(delivery.in_order(chunks)) as ready:
        async for chunk, tokens in ready:
            delivery.note_sent(tokens)
            if finishes(chunk):
                chunk["meta_info"][KEY] = delivery.report()
                delivery.count(chunk["meta_info"]["finish_reason"])
            yield chunk


@functools.cache
def _default_slo() -> SLO:
    config = OrbitFlowConfig.from_env()
    return SLO() if config is None else config.given_slo


class _Delivery:
    """One request on its way out. Times are those of ``time.perf_counter``, as SGLang's are."""

    def __init__(self, manager: Any, obj: Any, state: Any) -> None:
        self._manager, self._obj, self._state = manager, obj, state
        params = {**(manager.preferred_sampling_params or {}), **obj.sampling_params}
        self._own_slo = own = request_slo(custom_params_of(params), _default_slo())
        self._streams = bool(obj.stream)
        self._incremental = self._streams and bool(manager.incremental_streaming_output)
        arrival_s = state.time_stats.created_time
        self._received = TokenTimes(arrival_s, own)
        self._sent = TokenTimes(arrival_s, own)

    @property
    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = getattr(self._state, KEY, {})
        return part

    def slo(self) -> SLO:
        """The targets in force: the scheduler's once it has sent them, which hold our own."""
        targets = self._part.get("slo")
        if targets is None:
            return self._own_slo
        return SLO(targets["ttft_s"], targets["tpot_s"], targets["tbt_s"], self._own_slo.deposit)

    async def in_order(
        self, chunks: AsyncGenerator[Chunk, None]
    ) -> AsyncGenerator[tuple[Chunk, int], None]:
        """The chunks, each with the tokens up to it; paced where that was asked for."""
        if self._streams and self._own_slo.deposit:
            chunks_with_tokens = paced(
                chunks,
                self.slo,
                self._state.get_text,
                incremental=self._incremental,
                received=self._note_received,
            )
            async with aclosing(chunks_with_tokens):
                async for item in chunks_with_tokens:
                    yield item
            return
        tokens = 0
        async with aclosing(chunks):
            async for chunk in chunks:
                tokens = tokens_so_far(chunk, tokens, self._incremental)
                self._note_received(chunk, tokens)
                yield chunk, tokens

    def _note_received(self, chunk: Chunk, tokens: int) -> None:
        self._note(self._received, tokens)

    def note_sent(self, tokens: int) -> None:
        """All up to token ``tokens`` is about to leave."""
        self._note(self._sent, tokens)

    def _note(self, times: TokenTimes, tokens: int) -> None:
        times.slo = self.slo()
        times.add(time.perf_counter(), tokens - times.tokens)

    def report(self) -> dict[str, Any]:
        """What ``meta_info["orbitflow"]`` of the last chunk holds."""
        slo, part = self.slo(), self._part
        targets = {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, "tbt_s": slo.tbt_s}
        received = self._received if self._streams else None
        generated = part.get("generated", received and received.report())
        return {
            "slo": part.get("slo") or {**targets, "assumed": False},
            "generated": generated,
            "delivered": self._sent.report() if self._streams else generated,
            "pauses": part.get("pauses", 0),
            "deposit_tokens": part.get("deposit_tokens", received and received.deposit_tokens),
        }

    def count(self, finish_reason: Any) -> None:
        """Into the Prometheus counters, unless aborted, nothing is known of its tokens, or it only
        fills the cache."""
        delivered = self._sent.report() if self._streams else self._part.get("generated")
        aborted = isinstance(finish_reason, dict) and finish_reason.get("type") == "abort"
        wanted = not aborted and not self._part.get("fills_cache")
        counted = self._manager.enable_metrics and self._obj.log_metrics and wanted
        if not counted or delivered is None or delivered["ttft_s"] is None:
            return
        labels = dict(self._manager.metrics_collector.labels)
        for key, value in (self._obj.custom_labels or {}).items():
            if key in labels:
                labels[key] = value
        numbers = (delivered[key] for key in ("ttft_s", "tpot_s", "max_tbt_s"))
        count_delivered(Attainment.of(self.slo(), *numbers), labels)
