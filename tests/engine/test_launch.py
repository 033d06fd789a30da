"""What is told around the launch of a step: which pages it has, and how long another one took."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch


def batch(number: int = 0, beams: bool = False) -> SimpleNamespace:
    """A decode step of one request, which has been given slot 19."""
    modes = {"is_decode_or_idle": True, "is_extend": False, "is_mixed": False}
    return SimpleNamespace(
        reqs=[number], decoding_reqs=None, extend_num_tokens=None, prefix_lens=None,
        beam_tail="some" if beams else None,
        forward_mode=SimpleNamespace(**{name: lambda is_so=is_so: is_so
                                        for name, is_so in modes.items()}),
        req_pool_indices_cpu=torch.tensor([3]), seq_lens_cpu=torch.tensor([20 + number]),
        seq_lens=None, out_cache_loc=torch.tensor([19]),
    )  # fmt: skip


@pytest.mark.parametrize("beams", [False, True])
def test_a_step_is_announced_before_it_is_launched(
    monkeypatch: pytest.MonkeyPatch, beams: bool
) -> None:
    """But for that of a beam search, whose rows only the device knows by then."""
    from orbitflow_sglang.engine import runtime, scheduler

    said: list[object] = []
    placer = SimpleNamespace(spills=False, mirrors=False)
    ours = SimpleNamespace(
        control=None, placer=placer, announce=said.append, end=lambda: said.append("ended")
    )
    monkeypatch.setattr(scheduler, "runtime_of", lambda _: ours)
    scheduler.run_batch(lambda *_: said.append("launched"), SimpleNamespace(), batch(beams=beams))  # type: ignore[arg-type]
    if not beams:
        step = said.pop(0)
        assert isinstance(step, runtime.StepInput)
        assert (step.rows, step.seq_lens, step.prefix_lens) == ([3], [20], None)
        assert step.slots.tolist() == [19]
    assert said == ["launched", "ended"]


@pytest.mark.parametrize("ahead", [False, True])
def test_the_time_between_launches_is_that_of_the_step_that_ended(ahead: bool) -> None:
    """With the overlap scheduler on a GPU the last step still runs when the next is launched."""
    from orbitflow_sglang.engine import control, step_clock

    h2d = SimpleNamespace(bytes=0, busy_s=0.0)
    store = SimpleNamespace(
        ring=SimpleNamespace(note_stall=lambda: None, stall_s=0.0),
        engine=SimpleNamespace(h2d=h2d),
    )
    ours: Any = object.__new__(control.SchedulerControl)
    ours._leads, ours._runs_ahead = True, ahead
    ours._runtime = SimpleNamespace(store=store)
    ours._scheduler = SimpleNamespace(result_queue=[])
    ours._clock, ours.counts = step_clock.StepClock(), Counter()
    ours.controller = SimpleNamespace(stepped=lambda prefill: None, streamed_pages=0)
    ours.feedback = SimpleNamespace(step_s=lambda batch, context: 0.1, page_transfer_s=0.0)
    ended: list[int] = []
    ours._measured = lambda step, took: ended.append(step.context_tokens - 20)
    for number in range(4):
        ours.launch(batch(number))
        ours._scheduler.result_queue = [number]  # its result, not yet processed
    assert ended == ([0, 1] if ahead else [0, 1, 2])
