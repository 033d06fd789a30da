"""Who may be paused, what becomes of the room that a paused request leaves, and who waits.

In this process, on stand-ins for SGLang's objects; real servers do the same in test_control.py,
test_storms.py and test_faults.py.
"""

from __future__ import annotations

import importlib
from collections import Counter
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from orbitflow_sglang.slo import SLO


@pytest.fixture(scope="module")
def engine() -> dict[str, ModuleType]:
    names = ("control", "pausing", "pool", "retraction", "runtime", "scheduler")
    modules = {name: importlib.import_module(f"orbitflow_sglang.engine.{name}") for name in names}
    return modules | {"view": importlib.import_module("orbitflow_sglang.control.view")}


STAYS = ("beam_group", "multimodal_inputs", "session", "input_embeds", "to_finish")


def scheduler(**changed: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"enable_overlap": True, "enable_lora": False} | changed)


def request(**changed: Any) -> SimpleNamespace:
    sampling = {"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1}
    fine = dict.fromkeys(STAYS)
    params = SimpleNamespace(min_new_tokens=0, **sampling)
    return SimpleNamespace(sampling_params=params, finished=lambda: False, **fine | changed)


@pytest.mark.parametrize("part", STAYS)
def test_whoever_has_what_would_not_come_back_stays(
    engine: dict[str, ModuleType], part: str
) -> None:
    can_pause = engine["pausing"].can_pause
    assert can_pause(request(), scheduler())
    assert not can_pause(request(**{part: "something"}), scheduler())


def test_nobody_leaves_a_server_with_adapters(engine: dict[str, ModuleType]) -> None:
    """A batch may have so many, and the model without one counts: who came back could be one
    too many."""
    assert not engine["pausing"].can_pause(request(), scheduler(enable_lora=True))


def test_penalties_are_counted_a_step_late_under_overlap_alone(
    engine: dict[str, ModuleType],
) -> None:
    penalised = request()
    penalised.sampling_params.presence_penalty = 0.5
    assert engine["pausing"].can_pause(penalised, scheduler(enable_overlap=False))
    assert not engine["pausing"].can_pause(penalised, scheduler())


def test_where_a_paused_request_ends_newcomers_are_looked_at_again(
    engine: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []
    monkeypatch.setattr(engine["pausing"], "end", lambda scheduler, paused: ended.append(paused))
    control = object.__new__(engine["control"].SchedulerControl)
    control._scheduler = SimpleNamespace(running_batch=SimpleNamespace(batch_is_full=True))
    control.counts = Counter()
    control.paused = {"one": "first", "two": "second"}
    control.views = dict.fromkeys(control.paused, SimpleNamespace(settled=True))
    control.abort("three", everything=False)
    assert control._scheduler.running_batch.batch_is_full
    control.abort("one", everything=False)
    assert not control._scheduler.running_batch.batch_is_full
    assert (ended, control.paused) == (["first"], {"two": "second"})
    assert control.counts == {"left_paused": 1}


@pytest.mark.parametrize(("at_the_door", "came"), [(3.0, 3.0), (0.0, 5.0)])
def test_a_request_has_waited_since_it_came_to_the_server(
    engine: dict[str, ModuleType], at_the_door: float, came: float
) -> None:
    control = object.__new__(engine["control"].SchedulerControl)
    control.targets = SimpleNamespace(of=lambda tokens: SLO(ttft_s=1.0))
    control._scheduler = scheduler(enable_overlap=False)
    req = waiting("one")
    req.time_stats = SimpleNamespace(created_time=at_the_door, wait_queue_entry_time=5.0)
    assert control._new_view(req).arrival_s == came


def test_a_line_is_looked_through_again_whenever_it_is_another_one(
    engine: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, ended = engine["control"], []
    monkeypatch.setattr(module, "cached_prefix", lambda *_: (0, 0))
    control = object.__new__(module.SchedulerControl)
    control.targets = SimpleNamespace(of=lambda tokens: SLO(ttft_s=1.0))
    without_answer = []

    def finished(view: Any, no_answer: bool) -> None:
        ended.append(view.rid)
        without_answer.extend([view.rid] if no_answer else [])

    control.controller = SimpleNamespace(finished=finished)
    control.views, control.paused, control._line, control._waiting = {}, {}, [], {}
    control.longest_line = control._looked_up = 0
    control._aborted = set()
    line_of = scheduler(enable_overlap=False, chunked_req=None, tree_cache=None, waiting_queue=[])
    control._scheduler = line_of

    def observed(running: list[SimpleNamespace], line: list[SimpleNamespace]) -> list[tuple]:
        line_of.waiting_queue = line
        views = control._observe(SimpleNamespace(reqs=running), None).requests
        return [(view.rid, view.phase, view.tokens, view.prompt_tokens) for view in views]

    one, two, three = map(waiting, ("one", "two", "three"))
    assert observed([], [one, two]) == [("one", "waiting", 0, 2), ("two", "waiting", 0, 2)]
    one.kv.holds_kv, one.kv.kv_allocated_len = True, 5
    assert observed([one], [two]) == [("one", "decode", 5, 2), ("two", "waiting", 0, 2)]
    assert observed([one], [three]) == [("one", "decode", 5, 2), ("three", "waiting", 0, 2)]
    one.kv.holds_kv, one.output_ids = False, [7, 8, 9]  # retracted
    assert observed([], [three, one]) == [("three", "waiting", 0, 2), ("one", "waiting", 0, 5)]
    assert observed([], [three, one]) == [("three", "waiting", 0, 2), ("one", "waiting", 0, 5)]
    control._aborted.add("three")
    assert observed([], []) == []
    assert (ended[0], sorted(ended), control.longest_line) == ("two", ["one", "three", "two"], 2)
    assert without_answer == ["three"] and not control._aborted


def waiting(rid: str) -> SimpleNamespace:
    times = SimpleNamespace(created_time=1.0, wait_queue_entry_time=1.0)
    kv = SimpleNamespace(holds_kv=False, kv_allocated_len=0)
    req = request(
        rid=rid, origin_input_ids=[1, 2], output_ids=[], time_stats=times, kv=kv, cached_tokens=0
    )
    vars(req.sampling_params).update(custom_params=None, max_new_tokens=4)
    return req


@pytest.mark.parametrize("defers", [True, False])
def test_a_step_that_only_decodes_looks_for_grammars_that_are_ready(
    engine: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, defers: bool
) -> None:
    control = SimpleNamespace(pause=lambda batch: None, defers_prefill=lambda batch: defers)
    monkeypatch.setattr(engine["scheduler"], "control_of", lambda scheduler: control)
    queue: list[str] = []
    grammars = SimpleNamespace(
        has_waiting_grammars=lambda: True, get_ready_grammar_requests=lambda: ["compiled"]
    )
    scheduler = SimpleNamespace(grammar_manager=grammars, _add_request_to_queue=queue.append)
    assert engine["scheduler"].defer_prefill(lambda *_: False, scheduler, "running") == defers
    assert queue == (["compiled"] if defers else [])  # else SGLang does


def test_memory_can_be_emptied_behind_a_failed_copy(
    engine: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, abandoned = engine["pool"], []

    def broken() -> None:
        raise module.ResidencyError("a copy failed")

    store = SimpleNamespace(clear=broken, abandon=lambda: abandoned.append(True))
    monkeypatch.setattr(module.PagedTokenToKVPoolAllocator, "clear", lambda self: None)
    allocator = object.__new__(module.OrbitFlowAllocator)
    allocator._kvcache = SimpleNamespace(runtime=SimpleNamespace(store=store))
    allocator.clear()
    assert abandoned == [True]


@pytest.fixture()
def full(engine: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A scheduler without free slots; who gives up KV is noted in ``retracted``."""
    noted: list[str] = []
    control = SimpleNamespace(paused={})
    scheduler = SimpleNamespace(
        chunked_req=None, slots=0, needed=1, _reqs_finishing_inflight=lambda batch: [],
        tree_cache=SimpleNamespace(evictable_size=lambda: 0),
    )  # fmt: skip
    scheduler.token_to_kv_pool_allocator = SimpleNamespace(available_size=lambda: scheduler.slots)

    def give_up(rid: str) -> str:
        noted.append(rid)
        scheduler.slots += 1
        return rid

    def retract_prompt(scheduler: SimpleNamespace) -> None:
        give_up(scheduler.chunked_req.rid)
        scheduler.chunked_req = None

    control.retract_paused = lambda: give_up(control.paused.popitem()[0])
    module = engine["retraction"]
    monkeypatch.setattr(module, "_control", lambda: control)
    monkeypatch.setattr(module, "retracted", lambda rids: None)
    monkeypatch.setattr(engine["pausing"], "retract_prompt", retract_prompt)
    batch = SimpleNamespace(check_decode_mem=lambda: scheduler.slots >= scheduler.needed)
    return SimpleNamespace(control=control, scheduler=scheduler, retracted=noted, batch=batch)


@pytest.mark.parametrize(
    ("running", "needed", "finishing", "gives_up"),
    [
        (1, 1, [], ["two"]),
        (1, 2, [], ["two", "one"]),
        (1, 3, [], ["two", "one", "prompt"]),
        (2, 3, [], ["two", "one"]),  # SGLang retracts one of those that decode
        (1, 3, ["somebody"], []),
    ],
)
def test_paused_requests_then_the_prompt_give_up_kv_before_the_last_that_decodes(
    engine: dict[str, ModuleType], full: SimpleNamespace,
    running: int, needed: int, finishing: list[str], gives_up: list[str],
) -> None:  # fmt: skip
    full.control.paused = {"one": None, "two": None}
    full.scheduler.chunked_req = SimpleNamespace(rid="prompt")
    full.scheduler.needed = needed
    full.scheduler._reqs_finishing_inflight = lambda batch: finishing
    full.batch.reqs = ["somebody"] * running
    engine["retraction"].make_room(full.scheduler, full.batch)
    assert full.retracted == gives_up


def test_a_prompt_that_nobody_else_will_leave_room_for_gets_that_of_paused_ones(
    engine: dict[str, ModuleType], full: SimpleNamespace
) -> None:
    full.control.paused = {"one": None, "two": None}
    make_room = engine["retraction"].make_room_for_prompt
    make_room(full.scheduler, full.control)
    assert full.retracted == []
    full.scheduler.chunked_req = SimpleNamespace(rid="prompt")
    make_room(full.scheduler, full.control)
    make_room(full.scheduler, full.control)
    assert full.retracted == ["two"]


@pytest.mark.parametrize(
    ("free", "promised", "decoding_beside", "limit", "tokens"),
    [
        (640, 100, 0, 256, 256),
        (640, 540, 0, 256, 100),  # as SGLang: what is not promised
        (640, 800, 0, 256, 256),  # more is promised than is there: still in its turn
        (48, 800, 0, 256, 48),
        (0, 800, 0, 256, None),
        (640, 0, 640, 256, None),
        (640, 100, 300, -44, None),  # a mixed step whose decoding rows take up all of the chunk
    ],
)
def test_a_chunk_is_no_larger_than_the_slots_that_are_there(
    engine: dict[str, ModuleType],
    free: int, promised: int, decoding_beside: int, limit: int, tokens: int | None,
) -> None:  # fmt: skip
    allocator = SimpleNamespace(page_size=16, available_size=lambda: free)
    tree = SimpleNamespace(supports_mamba=lambda: False, evictable_size=lambda: 0)
    kind = engine["pool"].OrbitFlowPrefillBudget
    budget = kind(allocator, tree, num_mixed_decode_tokens=decoding_beside)
    budget.total_offset += promised
    assert budget.available_chunk_tokens(limit) == tokens


@pytest.mark.parametrize(("mixed", "chunk"), [(False, 64), (True, 74)])
def test_a_chunk_is_of_the_prompt_also_where_others_decode_in_it(
    engine: dict[str, ModuleType], mixed: bool, chunk: int
) -> None:
    module = engine["control"]
    control = object.__new__(module.SchedulerControl)
    control._lockstep, control.views = False, {}
    control.controller = SimpleNamespace(admitted=lambda number: None)
    control.decision = engine["view"].StepDecision(chunk_tokens=64)
    scheduler = SimpleNamespace(waiting_queue=[], chunked_prefill_size=512, is_mixed_chunk=mixed)
    control._scheduler = scheduler
    running = SimpleNamespace(reqs=["somebody"] * 10)
    plan = SimpleNamespace(batch_to_run=None)

    def choose() -> SimpleNamespace:
        assert scheduler.chunked_prefill_size == chunk
        return plan

    assert control.prefill_batch(running, choose) is plan
    assert scheduler.chunked_prefill_size == 512


def test_sglang_is_told_of_the_tokens_of_all_that_wait(engine: dict[str, ModuleType]) -> None:
    control = object.__new__(engine["control"].SchedulerControl)
    control._lockstep = False
    control.controller = SimpleNamespace(admitted=lambda number: None)
    control.decision = engine["view"].StepDecision(admit=frozenset({"one"}))
    one, two = (SimpleNamespace(rid=rid, seqlen=7) for rid in ("one", "two"))
    control._scheduler = SimpleNamespace(waiting_queue=[one, two], chunked_prefill_size=512)
    stats = SimpleNamespace(num_pending_tokens=0)

    def choose() -> SimpleNamespace:
        assert control._scheduler.waiting_queue == [one]
        control._scheduler.waiting_queue = []
        return SimpleNamespace(batch_to_run=SimpleNamespace(prefill_stats=stats))

    control.prefill_batch(SimpleNamespace(reqs=[]), choose)
    assert stats.num_pending_tokens == 7 and control._scheduler.waiting_queue == [two]


def test_what_a_step_reads(engine: dict[str, ModuleType]) -> None:
    """Of prompts what they had before it, and not what decodes beside them."""
    read = engine["control"]._context_tokens
    for extends, decoding, tokens in ((True, 0, 41), (True, 1, 32), (False, 3, 60)):
        batch = SimpleNamespace(
            reqs=["one", "two", "three"], prefix_lens=[32, 0, 9],
            seq_lens_cpu=torch.tensor([40, 10, 10]),
            forward_mode=SimpleNamespace(is_extend=lambda extends=extends: extends),
        )  # fmt: skip
        assert read(batch, decoding) == tokens
    assert read(SimpleNamespace(forward_mode=batch.forward_mode, seq_lens_cpu=None), 0) == 0


def test_a_first_token_counts_of_whom_nobody_had_looked_at(engine: dict[str, ModuleType]) -> None:
    """SGLang lets in whose grammar has just become ready behind the look at those that wait."""
    control = object.__new__(engine["control"].SchedulerControl)
    control.views, control._scheduler = {}, scheduler(enable_overlap=False)
    control.targets = SimpleNamespace(of=lambda tokens: SLO(ttft_s=1.0))
    control._report = lambda req, view, ends: None
    gone, refused, new = map(waiting, ("gone", "refused", "new"))
    gone.output_ids, gone.finished_output = [1, 2], True
    refused.finished_output = new.finished_output = None
    new.output_ids = [5]
    control.streaming_out([gone, refused, new])
    assert control.views.keys() == {"new"}
    assert control.views["new"].times.first_s is not None


def test_sglang_counts_the_pages_of_paused_requests_when_it_looks_for_leaks(
    engine: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = engine["scheduler"]
    known, other, empty = (SimpleNamespace(req=waiting(rid)) for rid in ("known", "other", "empty"))
    known.req.kv.holds_kv = other.req.kv.holds_kv = True
    control = SimpleNamespace(paused={p.req.rid: p for p in (known, other, empty)})
    monkeypatch.setattr(module.Runtime, "current", SimpleNamespace(control=control))
    assert module.owners_of_rows([known.req], None) == [known.req, other.req]
    monkeypatch.setattr(module.Runtime, "current", None)
    assert module.owners_of_rows([known.req], None) == [known.req]
