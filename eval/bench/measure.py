"""What the benchmarks share: decode steps timed at the client, and what to record with them.

All requests of a batch are sent at once. SGLang prefills them all before it decodes, so
between the last first token and the first last token every step decodes the whole batch.
Times are taken at events of the streams, which come only every ``STREAM_INTERVAL`` tokens
unless said otherwise: what it costs to stream is taken from the model's two cores.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import math
import os
import platform
import random
import shlex
import statistics
import sys
import threading
import time
import tokenize
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eval.client import Client
from eval.identity import FIRST_ORDINARY_TOKEN

ROOT = Path(__file__).resolve().parent.parent.parent
QUICK_RESULTS = ROOT / ".cache" / "bench"  # of smoke runs: not to be committed
STREAM_INTERVAL = 8
VOCAB_SIZE = 2048
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Event:
    """So many tokens of one request had arrived at that time."""

    at_s: float
    tokens: int


@dataclass(frozen=True)
class DecodeWindow:
    """The time in which all requests of a batch decode."""

    begin_s: float
    end_s: float
    requests: int
    tokens_per_s: float  # of the whole batch

    @property
    def step_s(self) -> float:
        """Seconds for one step, which gives every request one token."""
        return self.requests / self.tokens_per_s


def decode_window(streams: Sequence[Sequence[Event]], since_s: float = -math.inf) -> DecodeWindow:
    """Throughput while all of ``streams`` decode; raises ``ValueError`` if they never do.
    Only from ``since_s`` on.

    Of each request the first and the last event within the window count, so the time is
    that of whole steps.
    """
    begin = max(since_s, *(events[0].at_s for events in streams))
    end = min(events[-1].at_s for events in streams)
    rate = 0.0
    for events in streams:
        inside = [event for event in events if begin <= event.at_s <= end]
        if len(inside) < 2 or inside[-1].at_s <= inside[0].at_s:
            raise ValueError("the requests did not decode together: ask for more tokens")
        first, last = inside[0], inside[-1]
        rate += (last.tokens - first.tokens) / (last.at_s - first.at_s)
    return DecodeWindow(begin, end, len(streams), rate)


@dataclass(frozen=True)
class Spread:
    """Of several values, the middle and the ends."""

    median: float
    least: float
    most: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.least:.3f} to {self.most:.3f})"


def random_prompts(requests: int, tokens: int, seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [
        [chance.randrange(FIRST_ORDINARY_TOKEN, VOCAB_SIZE) for _ in range(tokens)]
        for _ in range(requests)
    ]


@dataclass(frozen=True)
class Batch:
    """What is asked of the server in one measurement; the prompts differ with the seed."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    stream_interval: int = STREAM_INTERVAL

    def measure(
        self,
        client: Client,
        seed: int,
        on_event: Callable[[int], None] | None = None,
        since_s: Callable[[], float] = lambda: -math.inf,
    ) -> DecodeWindow:
        """Sends the batch and times its decode steps; nothing of it is left in the cache.

        ``on_event(tokens)`` is called, by any thread, when every request has so many tokens;
        ``since_s()``, at the end, says from when on steps count.
        """
        prompts = random_prompts(self.requests, self.prompt_tokens, seed)
        watch = _Watch(self.requests, on_event)
        pool = ThreadPoolExecutor(self.requests, thread_name_prefix="stream")
        try:
            futures: list[Future[list[Event]]] = [
                pool.submit(_stream, client, prompt, self, watch, i)
                for i, prompt in enumerate(prompts)
            ]
            for future in as_completed(futures):
                future.result()
        finally:
            # Not waiting: when interrupted, the threads end as their server does.
            pool.shutdown(wait=False, cancel_futures=True)
        client.flush_cache()
        return decode_window([future.result() for future in futures], since_s())


class _Watch:
    """Tells how many tokens the slowest request of a batch has."""

    def __init__(self, requests: int, on_event: Callable[[int], None] | None) -> None:
        self._tokens = [0] * requests
        self._told = 0
        self._on_event = on_event
        self._lock = threading.Lock()

    def saw(self, index: int, tokens: int) -> None:
        with self._lock:
            self._tokens[index] = tokens
            slowest = min(self._tokens)
            news = slowest > self._told
            self._told = max(self._told, slowest)
        if news and self._on_event is not None:
            self._on_event(slowest)


def _stream(
    client: Client, prompt: Sequence[int], batch: Batch, watch: _Watch, index: int
) -> list[Event]:
    events = []
    answers = client.stream(
        prompt, batch.output_tokens, logprobs=False, stream_interval=batch.stream_interval
    )
    for answer in answers:
        events.append(Event(time.perf_counter(), len(answer.output_ids)))
        watch.saw(index, events[-1].tokens)
    return events


def threads_env(threads: int | None) -> dict[str, str]:
    """Environment of a server that computes with so many threads; None: with every core."""
    return {} if threads is None else {"OMP_NUM_THREADS": str(threads)}


# --- what is recorded with the numbers -----------------------------------------


def hash_of_files(patterns: Iterable[str], without: Collection[Path] = ()) -> str:
    """Names the code that results depend on: files of the repository, their paths and contents,
    of Python what it does."""
    digest = hashlib.sha256()
    for pattern in patterns:
        files = (path for path in ROOT.glob(pattern) if path.is_file() and path not in without)
        for path in sorted(files):
            content = path.read_bytes()
            if path.suffix == ".py":
                content = without_comments(content.decode()).encode()
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + content)
    return digest.hexdigest()[:16]


def without_comments(source: str) -> str:
    """Python less its comments, docstrings and blank lines: hours of results outlive a change of
    these."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            for row in range(docstring.lineno, (docstring.end_lineno or 0) + 1):
                lines[row - 1] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def write_whole(path: Path, data: bytes) -> None:
    """Whole or not at all: a campaign is stopped at any moment."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def write_result(path: Path, argv: Sequence[str], result: dict[str, Any]) -> None:
    """Writes ``result`` with the command, machine and versions that it comes from."""
    record = {
        "command": shlex.join(["python", "-m", _module(), *argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("orbitflow-sglang", "sglang", "torch")},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | result, indent=1) + "\n", encoding="utf-8")
    print(f"Written to {path}")


def machine() -> dict[str, Any]:
    """The processor, the cores this process may use, and how busy others keep them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "processor": next(names, platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "load_1min_at_end": round(os.getloadavg()[0], 2),
    }


def results_folder(*, gpu: bool = False, quick: bool = False, kind: str = "") -> Path:
    """The CPU has results of its own, and so has each kind of GPU; smoke runs are not kept."""
    if quick:
        return QUICK_RESULTS / kind
    name = "cpu"
    if gpu:
        import torch

        name = "-".join(torch.cuda.get_device_name().lower().split())
    return ROOT / "eval" / "results" / (f"{name}-{kind}" if kind else name)


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else "eval.bench"
