"""A client of one SGLang server's native API: what tests, demo and benchmarks ask of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import requests
from prometheus_client.parser import text_string_to_metric_families

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Request:
    """One greedy generation to ask for."""

    rid: str
    input_ids: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Generation:
    """What the server answered; the three sequences have one entry per output token."""

    rid: str
    output_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()  # of the chosen tokens; empty when not asked for
    gaps: tuple[float, ...] = ()  # logprob of the best token minus that of the second
    finish_reason: str | None = None  # "length", "stop", "abort"; None while it streams
    text: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict, repr=False)  # SGLang's meta_info

    @staticmethod
    def from_answer(answer: Mapping[str, Any]) -> Generation:
        """Reads an answer of ``/generate``, or one event of its stream."""
        meta = answer["meta_info"]
        top_two = meta.get("output_top_logprobs") or ()
        reason = meta["finish_reason"]
        return Generation(
            rid=meta["id"],
            output_ids=tuple(answer.get("output_ids") or ()),
            logprobs=tuple(entry[0] for entry in meta.get("output_token_logprobs") or ()),
            gaps=tuple(best[0] - second[0] for best, second in top_two),
            finish_reason=reason and reason["type"],
            text=answer.get("text", ""),
            meta=meta,
        )


class RequestFailed(RuntimeError):
    """The server refused a request; ``status`` is the HTTP code, or SGLang's own in a stream."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status = status
        self.message = message


@dataclass(frozen=True)
class Sample:
    """One series of ``/metrics``."""

    labels: Mapping[str, str]
    value: float


class Client:
    """Safe to use from several threads: each has a connection of its own."""

    def __init__(self, url: str, timeout_s: float = 600.0) -> None:
        self.url = url
        self.timeout_s = timeout_s
        self._local = threading.local()

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        *,
        rid: str | None = None,
        logprobs: bool = True,
        **sampling: Any,
    ) -> Generation:
        """Greedy unless ``sampling`` says otherwise; ``prompt`` is text or token ids."""
        body = _generate_body(prompt, max_new_tokens, rid, logprobs, sampling)
        return Generation.from_answer(self.post("/generate", body).json())

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        *,
        rid: str | None = None,
        logprobs: bool = True,
        **sampling: Any,
    ) -> Generator[Generation, None, None]:
        """Yields the generation so far after each event; ``close()`` disconnects midway."""
        body = _generate_body(prompt, max_new_tokens, rid, logprobs, sampling) | {"stream": True}
        with self.post("/generate", body, stream=True) as response:
            for line in response.iter_lines():
                if not line.startswith(b"data: ") or line == b"data: [DONE]":
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                _raise_refusal(event)
                yield Generation.from_answer(event)

    def generate_many(
        self,
        wanted: Sequence[Request],
        concurrency: int,
        progress: Callable[[Generation], None] | None = None,
        **options: Any,
    ) -> list[Generation]:
        """Generates all, ``concurrency`` at a time; answers are in the order of ``wanted``.

        ``progress`` is called in this thread as each one ends. The first failure is raised
        and cancels those not yet sent.
        """
        pool = ThreadPoolExecutor(concurrency, thread_name_prefix="generate")
        try:
            futures = [
                pool.submit(
                    self.generate,
                    request.input_ids,
                    request.max_new_tokens,
                    rid=request.rid,
                    **options,
                )
                for request in wanted
            ]
            for future in as_completed(futures):
                generation = future.result()
                if progress is not None:
                    progress(generation)
            return [future.result() for future in futures]
        finally:
            # Not waiting: a server that hangs must not hold up whoever wants to end it.
            pool.shutdown(wait=False, cancel_futures=True)

    def generate_batch(
        self, wanted: Sequence[Request], *, logprobs: bool = True, **sampling: Any
    ) -> list[Generation]:
        """Generates all, sent in one HTTP request, so that they arrive at once."""
        bodies = [
            _generate_body(one.input_ids, one.max_new_tokens, one.rid, logprobs, sampling)
            for one in wanted
        ]
        each = {name: [body[name] for body in bodies] for name in bodies[0]}
        return [Generation.from_answer(answer) for answer in self.post("/generate", each).json()]

    def abort(self, rid: str) -> None:
        """Aborts one request by its id; unknown ids are ignored."""
        self.post("/abort_request", {"rid": rid})

    def abort_all(self) -> None:
        self.post("/abort_request", {"abort_all": True})

    def server_info(self) -> dict[str, Any]:
        info: dict[str, Any] = self.get("/server_info").json()
        return info

    def orbitflow(self) -> list[dict[str, Any] | None]:
        """OrbitFlow's section of each DP rank; None where the server has none."""
        return [state.get("orbitflow") for state in self.server_info()["internal_states"]]

    def metrics(self) -> dict[str, list[Sample]]:
        """``/metrics`` by series name (counters with their ``_total``)."""
        series: dict[str, list[Sample]] = {}
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                series.setdefault(sample.name, []).append(Sample(sample.labels, sample.value))
        return series

    def flush_cache(self, timeout_s: float = 10.0) -> None:
        """Empties the radix cache; waits for the server to be idle, at most ``timeout_s``."""
        self.post(f"/flush_cache?timeout={timeout_s}", None)

    def wait_idle(self, timeout_s: float = 60.0) -> None:
        """Returns when no request is running or waiting in any scheduler.

        SGLang publishes its load after prefills, every few decode steps and all the time
        when idle. A report made during a prefill may show 0 requests, so only two
        reports in a row, both newer than this call, count as idle.
        """
        deadline = time.monotonic() + timeout_s
        newest = time.time()
        idle_reports = 0
        while idle_reports < 2:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not idle after {timeout_s:g} s: {self.loads()}")
            time.sleep(0.05)
            loads = self.loads()
            stamp = min(load["timestamp"] for load in loads)
            if stamp <= newest:
                continue
            newest = stamp
            idle = not any(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)
            idle_reports = idle_reports + 1 if idle else 0

    def loads(self) -> list[dict[str, Any]]:
        """SGLang's load report of each DP rank."""
        loads: list[dict[str, Any]] = self.get("/v1/loads").json()["loads"]
        return loads

    def get(self, path: str, **options: Any) -> requests.Response:
        return self._call("GET", path, **options)

    def post(self, path: str, body: Any, **options: Any) -> requests.Response:
        return self._call("POST", path, json=body, **options)

    def _call(self, method: str, path: str, **options: Any) -> requests.Response:
        options.setdefault("timeout", self.timeout_s)
        response = self._session().request(method, self.url + path, **options)
        if not response.ok:
            raise RequestFailed(response.status_code, _message(response))
        return response

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
            session.trust_env = False  # a proxy in the environment is not for localhost
        return session


def metric_sum(series: Mapping[str, Sequence[Sample]], name: str, **labels: str) -> float:
    """The sum of a metric's series that carry these labels; KeyError when there is none."""
    matching = [
        sample.value
        for sample in series[name]
        if all(sample.labels.get(key) == value for key, value in labels.items())
    ]
    if not matching:
        raise KeyError(f"{name} has no series with {labels}")
    return sum(matching)


def _raise_refusal(event: Mapping[str, Any]) -> None:
    """Once a stream is open SGLang can only refuse inside it, in one of two forms."""
    error = event.get("error")
    if error is None:
        # An abort that the user asked for carries no status code.
        reason = event["meta_info"]["finish_reason"] or {}
        error = reason if reason.get("status_code") else None
        if error is None:
            return
    if not isinstance(error, dict):
        raise RequestFailed(500, str(error))
    raise RequestFailed(
        int(error.get("status_code") or error.get("code") or 500), str(error.get("message"))
    )


def _generate_body(
    prompt: Prompt,
    max_new_tokens: int,
    rid: str | None,
    logprobs: bool,
    sampling: Mapping[str, Any],
) -> dict[str, Any]:
    body: dict[str, Any] = {"text": prompt} if isinstance(prompt, str) else {}
    if not body:
        body["input_ids"] = list(prompt)
    body["sampling_params"] = {
        "temperature": 0,
        "max_new_tokens": max_new_tokens,
        "ignore_eos": True,
    } | dict(sampling)
    if logprobs:
        body |= {"return_logprob": True, "top_logprobs_num": 2}
    if rid is not None:
        body["rid"] = rid
    return body


def _message(response: requests.Response) -> str:
    try:
        error = response.json()["error"]
        return str(error["message"]) if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        return response.text[:2000]
