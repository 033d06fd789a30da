"""The supervisor of ``eval.server`` with a process tree that tries to stay alive."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from eval.server import ROOT, Server, ServerFailed

pytestmark = pytest.mark.unit

# Ignores SIGTERM and has a child in a session of its own whose parent is gone.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.run(["sh", "-c", f"setsid sleep 300 {sys.argv[1]} & true"], check=True)
print("up", flush=True)
time.sleep(300)
"""
# A server as far as its health goes, with a child.
HEALTHY = """
import http.server, subprocess, sys

class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

subprocess.Popen(["sleep", "300", sys.argv[1]])
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Healthy).serve_forever()
"""
# A shell starts background jobs with SIGINT ignored, which children would inherit.
OWNER = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)
time.sleep(300)
"""


def alive(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        if mark in command and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def wait_for(condition: bool, mark: str, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while bool(alive(mark)) is not condition:
        assert time.monotonic() < deadline, alive(mark)
        time.sleep(0.05)


def supervised(mark: str) -> list[str]:
    supervise = [sys.executable, "-P", str(ROOT / "eval" / "supervise.py"), "0.3"]
    return [*supervise, sys.executable, "-c", STUBBORN, mark]


# `sleep 300 0.00…` sleeps a little longer: the mark tells our processes from all others.
@pytest.fixture
def mark() -> str:
    return f"0.00{os.getpid()}{time.monotonic_ns()}"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_tree_ends_with_its_owner_however_that_ends(how: signal.Signals, mark: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, *supervised(mark)], stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"up\n"
        wait_for(True, mark)
        owner.send_signal(how)
    wait_for(False, mark)


def test_closing_the_pipe_ends_the_tree_and_waits_for_it(mark: str) -> None:
    with subprocess.Popen(
        supervised(mark), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        wait_for(True, mark)
        process.stdin.close()
        process.wait(15)
    assert alive(mark) == []


def test_the_commands_exit_status_is_passed_on() -> None:
    command = [*supervised("0")[:4], sys.executable, "-c", "raise SystemExit(7)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.wait(15) == 7


def test_a_server_that_ends_at_once_fails_with_its_last_log_lines(tmp_path: Path) -> None:
    # A launcher that is not SGLang's comes first on the path of the server's process.
    launcher = tmp_path / "sglang" / "launch_server.py"
    launcher.parent.mkdir()
    (launcher.parent / "__init__.py").touch()
    launcher.write_text("print('no such model'); print(' - leaked x'); raise SystemExit(3)")
    server = Server([], env={"PYTHONPATH": str(tmp_path)}, log=tmp_path / "log")
    with pytest.raises(ServerFailed, match=r"status 3:\nno such model\n\(whole log") as caught:
        server.start()
    assert "leaked" not in str(caught.value)


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        server = Server([], port=other.getsockname()[1], log=tmp_path / "log")
        with pytest.raises(ServerFailed, match="cannot be used"):
            server.start()
    assert not server.log.exists()


def test_a_suspended_server_stands_still_with_all_its_processes(tmp_path: Path, mark: str) -> None:
    with Server([mark], command=("-c", HEALTHY), log=tmp_path / "log") as server:
        wait_for_stopped(mark, 0)
        with server.suspended():
            wait_for_stopped(mark, 2)  # all but the supervisor
        wait_for_stopped(mark, 0)
        assert server.healthy()


def wait_for_stopped(mark: str, count: int, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while (states := [one.status() for one in alive(mark)]).count(psutil.STATUS_STOPPED) != count:
        assert time.monotonic() < deadline, states
        time.sleep(0.05)
    assert len(states) == 3
