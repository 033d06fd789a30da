"""A patched SGLang: every way to start it takes OrbitFlow's flags, and tokens stay the same.

The installation is not touched: a copy of it, made of links, lies before it on the path.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from servers import CONCURRENCY, WANTED, Stock, in_full_only, orbitflow_args, run_python
from test_entry_points import ARENA, engine_result, engine_script, ids

from eval.server import Server
from orbitflow_sglang import patches

BY_NAME = """engine = sglang.Engine(
        model_path=model, dtype="float32", enable_orbitflow=True, orbitflow_policy="static:1",
        orbitflow_arena_tokens=2048, orbitflow_host_memory_gb=0.2,
    )"""

ASKED_BEFORE = """sglang.ServerArgs(model_path=model, enable_orbitflow=True)
    engine = sglang.Engine(model_path=model, dtype="float32")"""


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An environment in which ``import sglang`` finds a copy, patched by the command."""
    root = tmp_path_factory.mktemp("patched")
    installed = patches.installed() / "sglang"
    try:
        shutil.copytree(installed, root / "sglang", copy_function=os.link)
    except shutil.Error:  # another file system
        shutil.copytree(installed, root / "sglang", dirs_exist_ok=True)
    env = {"PYTHONPATH": str(root)}
    patches.change(patches.load(), root, "original")  # the installed one may be patched
    original = _state(root)
    for command in ("apply", "check"):
        assert _patches(command, env).returncode == 0
    yield env
    assert _patches("revert", env).returncode == 0 and _state(root) == original
    shutil.rmtree(root)


def _patches(command: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "orbitflow_sglang.patches", command, env=env)


def _state(root: Path) -> list[bytes]:
    return [patch.path(root).read_bytes() for patch in patches.load()]


@in_full_only
def test_an_engine_takes_the_flags_by_name(
    patched: dict[str, str], tmp_path: Path, stock: Stock
) -> None:
    result = engine_result(run_python(*engine_script(tmp_path, BY_NAME), env=patched))
    assert result["ids"] == ids(stock.answers("llama", WANTED))
    assert result["orbitflow"]["policy"] == "static:1"
    assert result["orbitflow"]["d2h"]["bytes"] > 0


@in_full_only
def test_an_engine_without_the_patches_says_how_to_get_them(tmp_path: Path) -> None:
    if patches.report(patches.load(), patches.installed())[1]:
        pytest.skip("the installed SGLang is patched")
    run = run_python(*engine_script(tmp_path, BY_NAME))
    assert run.returncode != 0
    assert re.search(
        r"ConfigError: sgl\.Engine takes enable_orbitflow only from a patched SGLang: run "
        r"`python -m orbitflow_sglang\.patches apply`",
        run.stderr,
    ), run.stderr[-2000:]


def test_an_engine_that_does_not_ask_is_refused_behind_one_that_did(
    patched: dict[str, str], tmp_path: Path
) -> None:
    run = run_python(*engine_script(tmp_path, ASKED_BEFORE), env=patched)
    assert run.returncode != 0
    assert "ConfigError: an earlier sgl.Engine of this process had" in run.stderr


def test_the_help_of_serve_shows_the_flags_with_the_patches(patched: dict[str, str]) -> None:
    sglang = str(Path(sys.executable).parent / "sglang")
    run = run_python(sglang, "serve", "--help", env=patched)
    _, _, group = run.stdout.partition("\norbitflow:\n")
    assert "--orbitflow-policy NAME" in group, run.stderr[-2000:]


@in_full_only
def test_workers_of_the_tokenizer_check_and_pace_requests(
    patched: dict[str, str], stock: Stock
) -> None:
    args = orbitflow_args("llama", *ARENA)
    with Server([*args, "--tokenizer-worker-num", "2"], env=patched) as server:
        answers = server.generate_many(WANTED, CONCURRENCY)
        assert ids(answers) == ids(stock.answers("llama", WANTED))
        bad = {"input_ids": [1, 2], "sampling_params": {
            "max_new_tokens": 2, "custom_params": {"orbitflow": {"tpot_slo_ms": -1}}}}  # fmt: skip
        for _ in range(6):  # whichever worker answers
            refused = requests.post(server.url + "/generate", json=bad, timeout=60)
            assert refused.status_code == 400 and "tpot_slo_ms" in refused.text
        good = {"input_ids": [1, 2], "sampling_params": {
            "max_new_tokens": 4, "ignore_eos": True,
            "custom_params": {"orbitflow": {"tpot_slo_ms": 80, "deposit": True}}}}  # fmt: skip
        for _ in range(4):
            answer = requests.post(server.url + "/generate", json=good, timeout=60).json()
            assert answer["meta_info"]["orbitflow"]["delivered"]["ttft_s"] > 0


@in_full_only
@pytest.mark.parametrize("command", ["sglang serve", "python -m sglang.launch_server"])
def test_both_commands_serve_the_same_tokens(
    command: str, patched: dict[str, str], stock: Stock
) -> None:
    args = orbitflow_args("llama", "--orbitflow-policy", "static:1", *ARENA)
    serve = [str(Path(sys.executable).parent / "sglang"), "serve"]
    options = {"command": serve} if command == "sglang serve" else {}
    with Server(args, env=patched, **options) as server:
        assert ids(server.generate_many(WANTED, CONCURRENCY)) == ids(stock.answers("llama", WANTED))
        (state,) = server.orbitflow()
    assert state is not None and state["policy"] == "static:1"
