"""Every way to start SGLang that OrbitFlow supports serves what stock SGLang serves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
import requests
from servers import CONCURRENCY, MODELS, WANTED, Stock, in_full_only, orbitflow_args, run_python

from eval.client import Client, Generation
from eval.server import ROOT, Server, ServerFailed, free_port
from eval.tiny_model import build
from orbitflow_sglang.config import CONFIG_ENV, OrbitFlowConfig

ARENA = ("--orbitflow-arena-tokens", "2048", "--orbitflow-host-memory-gb", "0.2")
# As README tells users of `sgl.Engine` to do it. SGLang starts its processes by
# `spawn`, which imports this file again: hence the guard.
ENGINE_SCRIPT = """
import json, sys
import sglang
from orbitflow_sglang.config import OrbitFlowConfig

if __name__ == "__main__":
    model, wanted = json.loads(sys.argv[1])
    ENGINE
    try:
        ids = []
        for prompt, tokens in wanted:
            sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": tokens}
            answer = engine.generate(input_ids=prompt, sampling_params=sampling)
            ids.append(answer["output_ids"])
        (state,) = engine.get_server_info()["internal_states"]
        print("RESULT", json.dumps({"ids": ids, "orbitflow": state.get("orbitflow")}))
    finally:
        engine.shutdown()
"""
EXPORTED = """OrbitFlowConfig(policy="static:1", arena_tokens=2048, host_memory_gb=0.2).export()
    engine = sglang.Engine(model_path=model, dtype="float32")"""
ENGINE_REFUSED = """
import multiprocessing, sys
import sglang
from orbitflow_sglang.config import OrbitFlowConfig

def serve():
    OrbitFlowConfig().export()
    sglang.Engine(model_path=sys.argv[1], dtype="float32", attention_backend="torch_native")

if __name__ == "__main__":
    if sys.argv[2:] == ["in a child"]:
        child = multiprocessing.get_context("spawn").Process(target=serve)
        child.start()
        child.join()
        sys.exit(child.exitcode)
    serve()
"""


def ids(generations: list[Generation]) -> list[list[int]]:
    return [list(generation.output_ids) for generation in generations]


def engine_script(folder: Path, engine: str) -> list[str]:
    """Arguments for Python that run ``ENGINE_SCRIPT`` with an engine built by ``engine``."""
    script = folder / "engine.py"
    script.write_text(ENGINE_SCRIPT.replace("ENGINE", engine))
    wanted = [(request.input_ids, request.max_new_tokens) for request in WANTED]
    return [str(script), orjson.dumps([str(build(MODELS["llama"])), wanted]).decode()]


def engine_result(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What the script printed."""
    found = re.search(r"^RESULT (.*)$", run.stdout, re.MULTILINE)
    assert found, run.stdout[-2000:] + run.stderr[-4000:]
    result: dict[str, Any] = orjson.loads(found.group(1))
    return result


@in_full_only
def test_sglang_serve_serves_the_tokens_of_stock_sglang(stock: Stock) -> None:
    # `sglang` is a console script; SGLang has no module to run in its place.
    command = [str(Path(sys.executable).parent / "sglang"), "serve"]
    args = orbitflow_args("llama", "--orbitflow-policy", "static:1", *ARENA)
    with Server(args, command=command) as server:
        (state,) = server.orbitflow()
        answers = server.generate_many(WANTED, CONCURRENCY)
        (after,) = server.orbitflow()
    assert state is not None and after is not None
    assert state["policy"] == "static:1"
    assert after["d2h"]["bytes"] > 0
    assert ids(answers) == ids(stock.answers("llama", WANTED))


@in_full_only
def test_make_serve_serves_until_it_is_interrupted() -> None:
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = ["make", "serve", f"ARGS=--port {port}"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, text=True, process_group=0) as make:
        assert make.stdout is not None
        try:
            assert any(line.strip() == f"Ready at {url}" for line in make.stdout)
            answer = Client(url).generate(WANTED[1].input_ids, 24)
            (state,) = Client(url).orbitflow()
        finally:
            os.killpg(make.pid, signal.SIGINT)  # Ctrl-C
        assert "Stopping." in make.stdout.read()
    with pytest.raises(requests.ConnectionError):
        Client(url).orbitflow()
    assert len(answer.output_ids) == 24
    assert state is not None and state["policy"] == "orbitflow"


@in_full_only
def test_an_engine_built_behind_export_gives_the_tokens_of_stock_sglang(
    stock: Stock, tmp_path: Path
) -> None:
    result = engine_result(run_python(*engine_script(tmp_path, EXPORTED)))
    assert result["orbitflow"]["policy"] == "static:1"
    assert result["orbitflow"]["d2h"]["bytes"] > 0
    assert result["ids"] == ids(stock.answers("llama", WANTED))


@pytest.mark.parametrize("where", [(), ("in a child",)], ids=["here", "in a child"])
def test_an_engine_that_cannot_work_raises_with_flag_reason_and_fix(
    tmp_path: Path, where: tuple[str, ...]
) -> None:
    script = tmp_path / "engine.py"
    script.write_text(ENGINE_REFUSED)
    run = run_python(str(script), str(build(MODELS["llama"])), *where)
    assert run.returncode != 0
    assert (
        "ConfigError: --enable-orbitflow does not support --attention-backend torch_native"
        in run.stderr
    )


@in_full_only
def test_a_configuration_in_the_environment_is_refused_without_the_flag() -> None:
    exported = orjson.dumps({"policy": OrbitFlowConfig().policy}).decode()
    server = Server(["--model-path", str(build(MODELS["llama"]))], env={CONFIG_ENV: exported})
    with pytest.raises(ServerFailed, match=f"{CONFIG_ENV} is set but .*: unset it, or add"):
        server.start()


def test_the_help_of_launch_server_shows_the_flags() -> None:
    run = run_python("-m", "sglang.launch_server", "--help")
    assert run.returncode == 0, run.stderr[-2000:]
    _, _, group = run.stdout.partition("\norbitflow:\n")
    assert "--enable-orbitflow" in group
    assert "--orbitflow-policy NAME" in group
