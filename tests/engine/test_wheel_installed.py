"""The wheel, installed away from the source tree, serves what stock SGLang serves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from servers import CONCURRENCY, WANTED, Stock, in_full_only, orbitflow_args, run_python
from test_entry_points import ARENA, ids

from eval.server import ROOT, Server


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the wheel comes first, and the source tree not at all."""
    folder = tmp_path_factory.mktemp("wheel")
    target = folder / "site"
    build = ["-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder), "."]
    _python(*build)
    (wheel,) = folder.glob("*.whl")
    _python("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel))
    # Without the second, the folder that a process starts in comes first of all.
    return {"PYTHONPATH": str(target), "PYTHONSAFEPATH": "1"}


def _python(*args: str) -> None:
    command = [sys.executable, *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@in_full_only
def test_the_installed_wheel_serves_the_tokens_of_stock_sglang(
    installed: dict[str, str], stock: Stock
) -> None:
    where = run_python("-c", "import orbitflow_sglang as o; print(o.__file__)", env=installed)
    assert Path(where.stdout.strip()).is_relative_to(installed["PYTHONPATH"])
    checked = run_python("-m", "orbitflow_sglang.patches", "check", env=installed)
    assert checked.returncode in (0, 1) and "0001-server-arguments" in checked.stdout
    args = orbitflow_args("llama", "--orbitflow-policy", "static:1", *ARENA)
    with Server(args, env=installed) as server:
        answers = server.generate_many(WANTED, CONCURRENCY)
        (state,) = server.orbitflow()
    assert ids(answers) == ids(stock.answers("llama", WANTED))
    assert state is not None and state["d2h"]["bytes"] > 0
