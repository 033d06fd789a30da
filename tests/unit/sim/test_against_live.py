"""The simulator's model of the machine of eval-live."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.live.calibrate import FILL, Calibration
from eval.sim.against_live import COPY_SLOWDOWN, TIERED_S, machine_of, main, profile_of
from eval.sim.hardware import Chunk

pytestmark = pytest.mark.unit
SETUP = {"arena_tokens": 4096, "link_gb_per_s": 0.4, "host_memory_gb": 0.25, "page_size": 16,
         "prefill_chunk": 512, "max_running": 32, "layers": 8}  # fmt: skip
COMPUTE = {"layers": 8, "constant_s": 1e-3, "per_request_s": 8e-5, "per_token_s": 2e-7, "r2": 0.9}
PROFILE = {"compute": COMPUTE, "page_bytes": 16_384}
CALIBRATION = Calibration("queue", 0.020, 5, 0.001, 2.5e-4, 1.1, 180.0, 0, 0.0)


def test_a_step_of_a_full_arena_takes_what_calibration_measured() -> None:
    machine = machine_of(SETUP, CALIBRATION, PROFILE)
    assert machine.arena_tokens == 4096 and machine.page_bytes == 16_384
    assert machine.step_s(5, int(FILL * 4096)) == pytest.approx(0.020, rel=1e-3)
    # Six requests: one more costs what the profile says, in every layer.
    assert machine.step_s(6, int(FILL * 4096)) == pytest.approx(0.020 + 8 * 8e-5, rel=1e-3)


def test_copies_and_chunks_cost_what_they_do_on_this_machine() -> None:
    machine = machine_of(SETUP, CALIBRATION, PROFILE)
    bare = machine.step_s(5, 2000)
    pages = int(bare / machine.h2d_page_s) + 1  # the link is busy throughout
    assert machine.step_s(5, 2000, (), pages) == pytest.approx(
        bare * (1 + COPY_SLOWDOWN) + TIERED_S, rel=1e-3
    )
    assert machine.step_s(0, 0, (Chunk(100, 0),)) == pytest.approx(0.001 + 0.025)


def test_stock_sglang_is_modelled_with_a_profile_that_another_server_measured() -> None:
    measured = {"orbitflow": {"profile": {"compute": COMPUTE}, "page_bytes": 16_384}}
    assert profile_of([measured], {"orbitflow": None}) == PROFILE
    with pytest.raises(ValueError, match="no run has a cost profile"):
        profile_of([], {"orbitflow": None})


def test_a_folder_without_runs_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.json").write_text("{}")  # of a campaign that has only begun
    assert main(["--results", str(tmp_path)]) == 1
    assert f"{tmp_path} has no runs: make eval-live, or give --results" in capsys.readouterr().err
