"""``make demo``: long requests decode together in an arena that could hold one of them.

Stock SGLang answers first and says which tokens are right. OrbitFlow then gets the same
requests with an arena much smaller than their KV. The demo shows where their layers were
while they decoded, how many decoded at once, what was moved, and whether the tokens are
the same: the exit status is 0 only when they are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

from eval.client import Client, RequestFailed
from eval.server import Server, ServerFailed, stock_args
from eval.tiny_model import TinyModel, build

LAYERS = 12
PAGE_SIZE = 16
ARENA_TOKENS = 2048
ORBITFLOW = (
    *("--enable-orbitflow", "--orbitflow-policy", "static:1", "--page-size", str(PAGE_SIZE)),
    *("--orbitflow-arena-tokens", str(ARENA_TOKENS), "--orbitflow-host-memory-gb", "0.5"),
)
# Prompts of about 1,500 to 2,700 tokens. They end one after another, so that the table
# shows layers coming back to the arena.
PROMPTS = (
    ("argparse", 5000, 24),
    ("tarfile", 4500, 32),
    ("random", 6500, 40),
    ("textwrap", 4500, 48),
    ("difflib", 7000, 56),
    ("calendar", 5500, 72),
)
TIME_POINTS = 8
POLL_S = 0.2


@dataclass(frozen=True)
class Prompt:
    """One request to the OpenAI API; the name is its id."""

    name: str
    text: str
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    prompt_tokens: int
    output_ids: tuple[int, ...]


@dataclass(frozen=True)
class Snapshot:
    """OrbitFlow's section of ``/server_info`` at one time."""

    at_s: float
    state: Mapping[str, Any]

    @property
    def requests(self) -> dict[str, Mapping[str, Any]]:
        return {request["rid"]: request for request in self.state["requests"]}


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    # A shell starts background jobs with SIGINT ignored: Ctrl-C and kill -INT always stop us.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return run(make_prompts(options.requests))
    except KeyboardInterrupt:
        print("\nStopped.")
        return 128 + signal.SIGINT
    except (ServerFailed, RequestFailed, requests.RequestException) as failure:
        print(f"\n{failure}", file=sys.stderr)
        return 1


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.demo", description=(__doc__ or "").replace("``", "")
    )
    most = len(PROMPTS)
    parser.add_argument(
        "--requests", type=int, choices=range(1, most + 1), default=most, metavar="N",
        help=f"concurrent requests, 1 to {most} (%(default)s)",
    )  # fmt: skip
    return parser.parse_args(argv)


def make_prompts(count: int) -> list[Prompt]:
    """The first so many characters of modules of the standard library, each to be continued."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return [
        Prompt(name, (library / f"{name}.py").read_text(encoding="utf-8")[:characters], max_tokens)
        for name, characters, max_tokens in PROMPTS[:count]
    ]


def run(prompts: Sequence[Prompt]) -> int:
    model = build(TinyModel(layers=LAYERS))
    print(f"{len(prompts)} requests at once to a tiny model of {LAYERS} layers, on the CPU.\n")
    print("1. Stock SGLang, which has room for everything, says which tokens are right.")
    stock = stock_args(model, "--attention-backend", "torch_native", "--max-total-tokens", "32768")
    with _running(stock) as server:
        expected = complete_all(server, prompts)
    print(f"\n2. OrbitFlow, whose arena has room for {ARENA_TOKENS:,} tokens in all layers:")
    print(_wrapped(ORBITFLOW))
    with _running(stock_args(model, *ORBITFLOW)) as server, _polling(server) as seen:
        got = complete_all(server, prompts)
    report(prompts, got, seen)
    equal = sum(e.output_ids == g.output_ids for e, g in zip(expected, got, strict=True))
    print(f"\nTokens equal to stock SGLang: {equal} of {len(prompts)}")
    return 0 if equal == len(prompts) else 1


def _wrapped(args: Sequence[str]) -> str:
    """Flags with their values, two a line."""
    flags = " ".join(args).replace(" --", "\n--").split("\n")
    pairs = [" ".join(flags[i : i + 2]) for i in range(0, len(flags), 2)]
    return "".join(f"     {pair}\n" for pair in pairs).rstrip()


# --- asking -------------------------------------------------------------------


@contextlib.contextmanager
def _running(args: Sequence[str]) -> Iterator[Server]:
    server = Server(args)
    show = sys.stdout.isatty()

    def waiting(elapsed_s: float) -> None:
        if show:
            print(f"\r   starting, {elapsed_s:.0f} s (takes about 25)", end="", flush=True)

    began = time.monotonic()
    try:
        server.start(waiting)
        started = f"   started in {time.monotonic() - began:.0f} s"
        print(("\r" if show else "") + started.ljust(40), flush=True)
        yield server
    finally:
        server.stop()


def complete_all(client: Client, prompts: Sequence[Prompt]) -> list[Answer]:
    """Sends all at once, with one progress bar over the tokens of all."""
    total = sum(prompt.max_tokens for prompt in prompts)
    began = time.monotonic()
    pool = ThreadPoolExecutor(len(prompts), thread_name_prefix="demo")
    with _Progress(total) as progress:
        try:
            futures: list[Future[Answer]] = [
                pool.submit(complete, client, prompt, progress.add) for prompt in prompts
            ]
            for future in as_completed(futures):
                future.result()  # the first failure is raised here
        finally:
            # Not waiting: when interrupted, the threads end as their server does.
            pool.shutdown(wait=False, cancel_futures=True)
    print(f"   {total} tokens in {time.monotonic() - began:.1f} s, prefill included", flush=True)
    return [future.result() for future in futures]


def complete(client: Client, prompt: Prompt, more: Callable[[int], None]) -> Answer:
    """One streamed completion of the OpenAI API; ``more`` is told how many tokens came."""
    body = {
        "model": "default",
        "prompt": prompt.text,
        "max_tokens": prompt.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        # SGLang's additions to the API.
        "rid": prompt.name,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    output_ids: list[int] = []
    prompt_tokens = 0
    with client.post("/v1/completions", body, stream=True) as response:
        for line in response.iter_lines():
            if not line.startswith(b"data: ") or line == b"data: [DONE]":
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise RequestFailed(int(event["error"].get("code") or 500), str(event["error"]))
            for choice in event["choices"]:
                new = choice.get("token_ids") or []
                output_ids += new
                more(len(new))
            prompt_tokens = (event.get("usage") or {}).get("prompt_tokens", prompt_tokens)
    return Answer(prompt_tokens, tuple(output_ids))


class _Progress:
    """A bar on a terminal; elsewhere a line for every quarter, so that a log stays readable."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._lock = threading.Lock()
        self._bar = tqdm(
            total=total, disable=not sys.stdout.isatty(), file=sys.stdout, ncols=78, unit="tok",
            desc="   tokens", leave=False, delay=0,
        )  # fmt: skip

    def add(self, tokens: int) -> None:
        with self._lock:
            before = self._done * 4 // self._total
            self._done += tokens
            self._bar.update(tokens)
            if self._bar.disable and (quarter := self._done * 4 // self._total) > before:
                print(f"   tokens {25 * quarter:3d} %", flush=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


@contextlib.contextmanager
def _polling(server: Server) -> Iterator[list[Snapshot]]:
    """Asks ``/server_info`` a few times a second; the last snapshot comes after the body."""
    seen: list[Snapshot] = []
    stop = threading.Event()
    began = time.monotonic()

    def look() -> None:
        (state,) = server.orbitflow()
        if state is not None:
            seen.append(Snapshot(time.monotonic() - began, state))

    def poll() -> None:
        while not stop.wait(POLL_S):
            try:
                look()
            except (requests.RequestException, RequestFailed):
                return  # the server is being stopped

    thread = threading.Thread(target=poll, name="poll", daemon=True)
    thread.start()
    try:
        yield seen
        stop.set()
        thread.join()
        look()
    finally:
        stop.set()


# --- telling ------------------------------------------------------------------


def report(prompts: Sequence[Prompt], got: Sequence[Answer], seen: Sequence[Snapshot]) -> None:
    tokens = sum(answer.prompt_tokens + len(answer.output_ids) for answer in got)
    print(f"\nTheir KV: {tokens:,} tokens, {tokens / ARENA_TOKENS:.1f} times the arena.")
    print(f"\nLayers wholly in the arena + layers with pages on the host (of {LAYERS}), over time")
    for line in layer_table(prompts, got, seen):
        print("  " + line)
    last = seen[-1].state
    print("\nRequests in one decode step (they decode together)")
    for line in batch_table(last["decode_batch_sizes"]):
        print("  " + line)
    print("\nMoved between host and arena")
    for key, text in (("h2d", "host to arena"), ("d2h", "arena to host")):
        link = last[key]
        size, times = link["bytes"] / 1e9, link["transfers"]
        print(f"  {text}  {size:6.2f} GB in {times:6,} transfers, {link['busy_s']:5.1f} s busy")
    print(f"  compute waited {last['stall_s']:.1f} s for pages, in {last['steps']} steps")


def layer_table(
    prompts: Sequence[Prompt], got: Sequence[Answer], seen: Sequence[Snapshot]
) -> list[str]:
    """A line per request: ``3+9`` at a time when 9 of its layers had pages on the host."""
    points = spread([snapshot for snapshot in seen if snapshot.requests], TIME_POINTS)
    head = f"{'request':<10}{'tokens':>12}"
    lines = [head + "".join(f"{point.at_s:6.1f}s" for point in points)]
    for prompt, answer in zip(prompts, got, strict=True):
        size = f"{answer.prompt_tokens}+{len(answer.output_ids)}"
        cells = (_cell(point.requests.get(prompt.name)) for point in points)
        lines.append(f"{prompt.name:<10}{size:>12}" + "".join(f"{cell:>7}" for cell in cells))
    return lines


def _cell(request: Mapping[str, Any] | None) -> str:
    if request is None:
        return "."  # not begun, or over
    return f"{request['layers_on_device']}+{request['layers_on_host']}"


def spread(items: Sequence[Snapshot], count: int) -> list[Snapshot]:
    """At most ``count`` of ``items``, evenly spread, first and last included."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def batch_table(sizes: Mapping[str, int]) -> list[str]:
    """How many decode steps had how many requests, with a bar."""
    most = max(sizes.values(), default=0)
    lines = []
    for size, steps in sorted(sizes.items(), key=lambda item: -int(item[0])):
        noun = "request " if size == "1" else "requests"
        bar = "#" * math.ceil(40 * steps / most)
        lines.append(f"{size} {noun} {steps:5d} steps  {bar}")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
