"""Run one command and leave none of its processes behind.

``python supervise.py GRACE_S COMMAND…`` runs the command until it ends or until
standard input closes, and then ends the whole process tree: SIGTERM to the group,
SIGKILL to whatever is alive after the grace. Standard input is a pipe held by the
process that wants the command alive, so the tree ends however that process ends,
``kill -9`` included. Standard library and psutil only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import tempfile
import time

import psutil

POLL_S = 0.1
KILL_TIMEOUT_S = 20.0
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def main(grace_s: float, command: list[str]) -> int:
    # Processes whose parent died become our children instead of init's: a tree cannot
    # lose members by forking twice.
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is our owner's to act on
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # SGLang leaves its sockets in the temporary folder; this one goes when we do.
    with tempfile.TemporaryDirectory(prefix="orbitflow-", ignore_cleanup_errors=True) as scratch:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"TMPDIR": scratch},
            preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        )
        try:
            while child.poll() is None and not _owner_left(POLL_S):
                pass
        finally:
            end_tree(child, grace_s)
    return child.returncode


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _owner_left(timeout_s: float) -> bool:
    ready, _, _ = select.select([0], [], [], timeout_s)
    return bool(ready) and not os.read(0, 4096)


def end_tree(child: subprocess.Popen[bytes], grace_s: float) -> None:
    """Ends every descendant of this process; ``child`` leads their process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    _wait_for_descendants(child, grace_s)
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while _descendants() and time.monotonic() < deadline:
        for process in _descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _wait_for_descendants(child, 1.0)


def _wait_for_descendants(child: subprocess.Popen[bytes], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while _descendants() and time.monotonic() < deadline:
        _reap(child)
        time.sleep(0.02)


def _reap(child: subprocess.Popen[bytes]) -> None:
    child.poll()  # first: waiting for any process would lose the child's exit status
    for process in psutil.Process().children():
        if process.pid != child.pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)


def _descendants() -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process().children(recursive=True)
    return found


if __name__ == "__main__":
    status = main(float(sys.argv[1]), sys.argv[2:])
    sys.exit(status if status >= 0 else 128 - status)
