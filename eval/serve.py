"""``make serve``: an SGLang server with OrbitFlow on, and what to try on it.

Serves the embedded tiny model on the CPU, with an arena smaller than the prompt it suggests,
or the model that ``MODEL`` or ``--model`` names, on an NVIDIA GPU where there is one, with
SGLang's own memory defaults. What follows ``--`` goes to the server as it is and wins over the
arguments chosen here.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from eval.server import GPU_ENV, GPU_START_S, LOGS, Server, ServerFailed, stock_args
from eval.tiny_model import TinyModel, build

DEFAULT_PORT = 30000
# Of the tiny model: 2,048 tokens in the arena, 61,000 in host memory.
TINY_ARENA = ("--orbitflow-arena-tokens", "2048", "--orbitflow-host-memory-gb", "0.5")
PROMPT = '"def scale(values, factor):\\n    return [factor * v for v in values]\\n" * 250'

HINTS = """\
Try it: a prompt of several thousand tokens, which the arena does not hold in every layer.

  {python} -c 'import json; print(json.dumps({{"text": {prompt},
      "sampling_params": {{"max_new_tokens": 256, "temperature": 0, "ignore_eos": True}}}}))' |
  curl -s {url}/generate -H 'Content-Type: application/json' -d @-

Where to look, also while it runs:

  curl -s {url}/server_info | {python} -c 'import json, sys; \
print(json.dumps([s.get("orbitflow") for s in json.load(sys.stdin)["internal_states"]], indent=1))'
  curl -s {url}/metrics | grep orbitflow
  tail -f {log}

Ctrl-C stops the server."""


def main(argv: Sequence[str]) -> int:
    options, server_args = _parse(argv)
    # A shell starts background jobs with SIGINT ignored: Ctrl-C and kill -INT always stop us.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    server = _server(options, server_args)
    print("python -m sglang.launch_server", shlex.join(server.args))
    try:
        server.start(waiting=_show_waiting)
        print(f"\rReady at {server.url}" + " " * 20 + "\n")
        print(HINTS.format(python=_python(), url=server.url, log=server.log, prompt=PROMPT))
        while True:
            time.sleep(0.5)
            server.check_alive()
    except KeyboardInterrupt:
        print("\nStopping.")
        return 0
    except ServerFailed as failure:
        print(f"\n{failure}", file=sys.stderr)
        return 1
    finally:
        server.stop()


def _server(options: argparse.Namespace, server_args: Sequence[str]) -> Server:
    ours = [] if options.stock else ["--enable-orbitflow", "--orbitflow-policy", options.policy]
    where = {"port": options.port, "log": LOGS / f"serve-{options.port}.log"}
    gpu = _gpu_answers()
    if options.model and gpu:
        args = ["--model-path", options.model, "--enable-metrics", *ours, *server_args]
        return Server(args, base_env=GPU_ENV, start_timeout_s=GPU_START_S, **where)
    if gpu:
        print("The tiny model is served on the CPU; MODEL=/path serves a real one on the GPU.")
    if not (options.model or options.stock):
        ours += TINY_ARENA
    return Server([*stock_args(options.model or build(TinyModel())), *ours, *server_args], **where)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    at = list(argv).index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="python -m eval.serve", description=(__doc__ or "").replace("``", "")
    )
    parser.add_argument(
        "--model",
        default=os.environ.get("MODEL") or None,
        help="a model's folder (default: $MODEL, else the embedded tiny model)",
    )
    parser.add_argument("--policy", default="orbitflow", help="OrbitFlow policy (%(default)s)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="(%(default)s)")
    parser.add_argument("--stock", action="store_true", help="leave OrbitFlow off, to compare")
    return parser.parse_args(argv[:at]), list(argv[at + 1 :])


def _gpu_answers() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi"], capture_output=True, check=False).returncode == 0


def _python() -> str:
    relative = os.path.relpath(sys.executable)
    return sys.executable if relative.startswith("..") else relative


def _show_waiting(elapsed_s: float) -> None:
    if sys.stdout.isatty():
        print(f"\rStarting, {elapsed_s:.0f} s (takes about 30)", end="", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
