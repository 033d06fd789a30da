"""Start an SGLang server on this machine, use it, and leave nothing of it behind.

    with Server(stock_args(model)) as server:
        server.generate("def f(x):", max_new_tokens=16)

The server runs under ``supervise.py``, which ends its whole process tree when this
process ends in whatever way, so that a killed test run leaves no orphan.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import requests

from eval.client import Client

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / ".cache" / "logs"
PROFILES = ROOT / ".cache" / "profiles"  # measured costs, kept out of the user's home
HOST = "127.0.0.1"

# The CPU platform also where there is a GPU; nothing is looked up on the network. PyTorch's
# threads sleep at a barrier instead of spinning: a spinning one takes the core from the one
# it waits for, and where others use the cores too steps took 4 times as long at the median.
CPU_ENV: Mapping[str, str] = {
    "CUDA_VISIBLE_DEVICES": "",
    "SGLANG_PLATFORM": "orbitflow_native",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "ORBITFLOW_CACHE_DIR": str(PROFILES),
}
# The platform that SGLang chooses, on whatever GPU there is.
# Stock SGLang takes the kernels that we take: by itself it would have FlashInfer choose fa3 on
# Hopper, and compile that for longer than it lets a step take.
GPU_ENV: Mapping[str, str] = {
    **{key: CPU_ENV[key] for key in ("HF_HUB_OFFLINE", "ORBITFLOW_CACHE_DIR")},
    "SGLANG_FLASHINFER_USE_PAGED": "1",
}
GPU_START_S = 900.0  # FlashInfer compiles what it has not compiled before
# A configuration that leaked in from the outside would turn a stock server into another.
LEFT_OUT_OF_ENV = ("ORBITFLOW_CONFIG",)
LAUNCH_SERVER = ("-m", "sglang.launch_server")  # what the interpreter is given to run
# float32: with "auto" SGLang runs float16, whose rounding hides errors and which is slower
# on a CPU. Without the warm-up the first health check is the first request.
CPU_ARGS = ("--dtype", "float32", "--enable-metrics", "--skip-server-warmup")
# Printed at every exit, at every start, and before argparse names a wrong flag.
NOISE = re.compile(r"^nanobind|^ - leaked |^ - \.\.\. skipped|refleaks|Ignore import error|^ +\[--")


class ServerFailed(RuntimeError):
    """The server ended, or did not become healthy; the message has its last log lines."""


def stock_args(model: Path | str, *extra: str) -> list[str]:
    """Arguments of a stock SGLang server on CPU; ``extra`` comes last and so wins."""
    return ["--model-path", str(model), *CPU_ARGS, *extra]


def free_port() -> int:
    """A port that nothing uses, below those that the system gives to outgoing connections.

    Among those, a health check before the server listens can get the server's own port and
    connect to itself, and the server then finds its port taken.
    """
    while True:
        port = random.randrange(20_000, 30_000)
        try:
            _check_free(port)
        except ServerFailed:
            continue
        return port


def _check_free(port: int) -> None:
    """Another server on the port would answer our health check in our server's place."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as SGLang's own does
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ServerFailed(f"port {port} cannot be used ({error}): choose another") from None


class Server(Client):
    """One SGLang server; the context manager starts and stops it."""

    def __init__(
        self,
        args: Sequence[str],
        *,
        command: Sequence[str] = LAUNCH_SERVER,
        env: Mapping[str, str] | None = None,
        base_env: Mapping[str, str] = CPU_ENV,
        port: int | None = None,
        log: Path | None = None,
        start_timeout_s: float = 240.0,
        timeout_s: float = 600.0,
        grace_s: float = 1.0,
    ) -> None:
        """``env`` adds to the environment and ``base_env``; ``timeout_s`` is for one request.

        ``grace_s`` is how long the processes have between SIGTERM and SIGKILL. SGLang
        looks at a SIGTERM every 5 s only, so a short grace is the quick way to end it.
        """
        self.port = port or free_port()
        super().__init__(f"http://{HOST}:{self.port}", timeout_s)
        self.args = [*args, "--host", HOST, "--port", str(self.port)]
        self.log = log or LOGS / f"server-{os.getpid()}-{self.port}.log"
        self._command = [sys.executable, *command]
        self._env = dict(base_env) | dict(env or {})
        self._start_timeout_s = start_timeout_s
        self._grace_s = grace_s
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, waiting: Callable[[float], None] | None = None) -> None:
        """Returns when the server is healthy; ``waiting`` is called with the seconds so far.

        Raises ``ServerFailed`` when it ends before, or takes too long.
        """
        if self._process is not None:
            raise RuntimeError("the server runs already")
        _check_free(self.port)
        environment = {k: v for k, v in os.environ.items() if k not in LEFT_OUT_OF_ENV}
        supervise = [sys.executable, "-P", str(ROOT / "eval" / "supervise.py"), str(self._grace_s)]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*supervise, *self._command, *self.args],
                cwd=ROOT,
                env=environment | self._env,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_for_health(waiting)
        except BaseException:
            self.stop()
            raise

    def _wait_for_health(self, waiting: Callable[[float], None] | None) -> None:
        began = time.monotonic()
        while (elapsed := time.monotonic() - began) < self._start_timeout_s:
            if waiting is not None:
                waiting(elapsed)
            self.check_alive()
            if self.healthy():
                return
            time.sleep(0.3)
        raise ServerFailed(f"not healthy after {elapsed:.0f} s:\n{self.log_tail()}")

    def healthy(self) -> bool:
        try:
            return requests.get(self.url + "/health", timeout=25).ok
        except requests.RequestException:
            return False

    def check_alive(self) -> None:
        """Raises ``ServerFailed`` when the server has ended."""
        if self._process is None:
            raise ServerFailed("the server was not started, or was stopped")
        if (status := self._process.poll()) is not None:
            raise ServerFailed(f"the server ended with status {status}:\n{self.log_tail()}")

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of the log, without what SGLang prints at every exit."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        kept = [line for line in text.splitlines() if line.strip() and not NOISE.search(line)]
        return "\n".join([*kept[-lines:], f"(whole log: {self.log})"])

    def stop(self) -> None:
        """Ends the whole process tree; returns when no process of it is left."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()  # supervise.py takes this as the order to end
        process.wait(timeout=self._grace_s + 30)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Stops its processes meanwhile: those of an idle server take a core otherwise."""
        assert self._process is not None
        processes = psutil.Process(self._process.pid).children(recursive=True)
        _signal(processes, signal.SIGSTOP)
        try:
            yield
        finally:
            _signal(processes, signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
