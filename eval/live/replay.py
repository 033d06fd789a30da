"""Sends a trace to a server in real time and notes when each token arrives.

Open loop: a request is sent at its arrival time by the clock, however many are unanswered.
A token's time is when the client read the event that brought it; tokens that share an event
share its time, so a server that holds tokens back shows as one long gap, not as many short.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from eval.workload.requests import TraceRequest

READ_BYTES = 1 << 20  # an event repeats all ids so far: aiohttp refuses long lines otherwise
DATA, DONE = b"data: ", b"data: [DONE]"


@dataclass
class Answer:
    """What came back for one request; times in seconds since the start of the replay."""

    request: TraceRequest
    sent_s: float = 0.0
    events: list[tuple[float, int]] = field(default_factory=list)  # time, tokens so far
    output_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    orbitflow: Mapping[str, Any] | None = None  # of the last event's meta_info

    @property
    def token_s(self) -> list[float]:
        """When each token arrived, in seconds after the planned arrival."""
        found: list[float] = []
        for at_s, tokens in self.events:
            found += [at_s - self.request.arrival_s] * (tokens - len(found))
        return found


def replay(
    url: str,
    trace: Sequence[TraceRequest],
    prompts: Sequence[Sequence[int]],
    timeout_s: float = 900.0,
) -> list[Answer]:
    """Returns when every request has ended, failed, or waited for ``timeout_s``."""
    bodies = [_body(one, prompt) for one, prompt in zip(trace, prompts, strict=True)]
    return asyncio.run(_replay(url, trace, bodies, timeout_s))


async def _replay(
    url: str, trace: Sequence[TraceRequest], bodies: Sequence[bytes], timeout_s: float
) -> list[Answer]:
    connector = aiohttp.TCPConnector(limit=0)  # the default of 100 would close the loop
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(
        url, connector=connector, timeout=timeout, read_bufsize=READ_BYTES
    ) as session:
        began = time.perf_counter()
        tasks = [_send(session, one, body, began) for one, body in zip(trace, bodies, strict=True)]
        return await asyncio.gather(*tasks)


async def _send(
    session: aiohttp.ClientSession, request: TraceRequest, body: bytes, began: float
) -> Answer:
    answer = Answer(request)
    await asyncio.sleep(began + request.arrival_s - time.perf_counter())
    answer.sent_s = time.perf_counter() - began
    try:
        headers = {"Content-Type": "application/json"}
        async with session.post("/generate", data=body, headers=headers) as response:
            if response.status != 200:
                answer.error = f"HTTP {response.status}: {(await response.text())[:500]}"
                return answer
            async for line in response.content:
                now = time.perf_counter() - began
                if line.startswith(DATA) and not line.startswith(DONE):
                    read_event(answer, now, orjson.loads(line[len(DATA) :]))
    except TimeoutError:
        answer.error = "timeout"
    except (aiohttp.ClientError, OSError, ValueError, KeyError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    if answer.error is None and len(answer.output_ids) != request.output_tokens:
        answer.error = f"{len(answer.output_ids)} tokens ({answer.finish_reason})"
    return answer


def read_event(answer: Answer, at_s: float, event: Mapping[str, Any]) -> None:
    """Adds one event of the stream to the answer."""
    if (failed := event.get("error")) is not None:
        answer.error = str(failed)
        return
    meta = event["meta_info"]
    ids = event.get("output_ids") or []
    if len(ids) > len(answer.output_ids):
        answer.events.append((at_s, len(ids)))
        answer.output_ids = ids
    reason = meta.get("finish_reason")
    if reason:
        answer.finish_reason = reason["type"]
        answer.orbitflow = meta.get("orbitflow")
        if reason["type"] == "abort":
            answer.error = f"abort: {reason.get('message')}"


def _body(request: TraceRequest, prompt: Sequence[int]) -> bytes:
    """Made before the clock starts: the client shares two cores with the server."""
    sampling: dict[str, Any] = {
        "temperature": 0,
        "max_new_tokens": request.output_tokens,
        "ignore_eos": True,
        "stream_interval": 1,
    }
    if request.custom_params:
        sampling["custom_params"] = request.custom_params
    return orjson.dumps(
        {"input_ids": list(prompt), "rid": request.rid, "stream": True, "sampling_params": sampling}
    )
