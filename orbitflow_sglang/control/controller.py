"""What happened -> what the next step does. One object for the server and the simulator.

Each step it sorts the requests, says how much may be streamed, sets requests aside or brings
them back, orders and admits those that wait, sizes the next prefill chunk, and has the
planner place what decodes. While everything fits and nobody waits it says nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from orbitflow_sglang.control import rules
from orbitflow_sglang.control.balance import Balance
from orbitflow_sglang.control.line import Line
from orbitflow_sglang.control.planning import WINDOW_STEPS, Planning, Worker, placement_of
from orbitflow_sglang.control.policies import PolicySpec
from orbitflow_sglang.control.prompts import PrefillCosts, Prompts
from orbitflow_sglang.control.rules import Candidacy, Candidate
from orbitflow_sglang.control.scene import Scene, lost, pages_ahead, pages_used
from orbitflow_sglang.control.view import (
    NOTHING,
    Machine,
    Observation,
    RequestView,
    StepDecision,
    UnitView,
)
from orbitflow_sglang.planner.problem import IntArray, PlanningProblem

MIN_RUN_STEPS = 4  # that a request decodes between two pauses
REMEMBERED_REASONS = 64


class Costs(PrefillCosts, Protocol):
    """What things take, as far as it is known now: ``feedback.Feedback``."""

    def step_s(self, batch: int, context_tokens: int) -> float:
        """A decode step as steps go at present, with what copies beside it add, seconds."""

    @property
    def page_transfer_s(self) -> float:
        """H2D of one page of one layer, seconds."""

    def planned(self) -> None:
        """A plan was made with what things take by now."""


class Controller:
    """Decides step by step; ``decide`` is called before each, ``stepped`` behind it."""

    def __init__(
        self, spec: PolicySpec, machine: Machine, costs: Costs, worker: Worker | None
    ) -> None:
        self.spec = spec
        self.machine = machine
        self.costs = costs
        self.planning = Planning(machine, spec.mode, worker)
        self.reasons: deque[str] = deque(maxlen=REMEMBERED_REASONS)
        self.hidden_pages = 0.0  # h as last computed
        self.budget_pages = 0  # S_max as last computed
        self.streamed_pages = 0  # of the plan in force
        self._returning: dict[str, None] = {}
        self._resumed_at: dict[str, int] = {}  # tokens generated when last resumed
        self._grants = 0
        self._prompts = Prompts(spec, machine, costs)
        self._line = Line()
        self._ordered: list[Candidacy] = []
        self._granted: set[str] = set()
        self._replan = False
        self._plan_steps = 0
        self._mirrored, self._mirror_steps = "", 0  # who is, and since when
        self._placed: tuple[frozenset[str], frozenset[str]] | None = None  # None: all resident
        self._balance = Balance(machine, costs)
        self._shared: list[UnitView] = []  # as last looked at
        self._batch: frozenset[str] = frozenset()  # whom the authors' plan is for, paused or not

    # --- what happened --------------------------------------------------------

    def stepped(self, prefill: bool) -> None:
        """A step begins: with prompt tokens, or only decoding."""
        self._prompts.stepped(prefill)
        self._plan_steps += 1

    def drifted(self) -> None:
        """Measured steps disagree with predicted ones: plan again."""
        self._replan = True

    def finished(self, view: RequestView, probe: bool = False) -> None:
        """A request has ended. ``probe``: it asked for life, and says nothing about others."""
        if not probe:
            self._balance.ended(view)
        self._shared.clear()  # another may come by the same name
        self._returning.pop(view.rid, None)
        self._resumed_at.pop(view.rid, None)

    # --- the decision ---------------------------------------------------------

    def decide(self, obs: Observation) -> StepDecision:
        """What the engine does before and in its next step."""
        if self.spec.overflow == "retract" and not self.spec.rules:
            return NOTHING  # SGLang decides everything
        scene = Scene.of(obs)
        scene.shared = self._shared
        crowded = bool(scene.waiting or scene.prefilling or scene.paused)
        if (
            not crowded
            and self._placed is None
            and self._used(scene, scene.decoding) <= self.machine.main_pages
        ):
            return NOTHING
        scene.waiting = self._line.looked_at(scene.waiting)
        self._weigh(scene, obs)
        pause = self._overflow(scene)
        pause += self._grant(scene, pause)
        resume, fetch = self._returns(scene)
        order, admit = self._admission(scene)
        if admit is not None and not (admit or scene.prefilling):
            chunk_tokens, prefill = None, False  # nobody may start
        else:
            chunk_tokens, prefill = self._prompts.chunk(scene, self._granted)
        placement, paper_pauses = self._place(scene, obs, pause)
        mirror = self._mirror(scene, pause)
        self.reasons.extend(scene.reasons)
        return StepDecision(
            pause=(*pause, *paper_pauses),
            resume=resume,
            order=order,
            admit=admit,
            prefill=prefill,
            chunk_tokens=chunk_tokens,
            placement=placement,
            move_pages=max(self.machine.layers, int(scene.hidden_pages)),
            fetch=fetch,
            fetch_pages=max(self.machine.layers, self._spare(scene)),
            mirror=mirror,
            mirror_pages=max(self.machine.layers, int(scene.hidden_pages / 4)),
            reasons=tuple(scene.reasons),
        )

    # --- the scene ------------------------------------------------------------

    def _pages(self, view: RequestView) -> int:
        return pages_ahead(view, self.machine)

    def _used(self, scene: Scene, views: Sequence[RequestView]) -> int:
        return pages_used(scene, views, self.machine)

    def _held(self, scene: Scene) -> int:
        """Pages that those set aside hold on the host."""
        return self.machine.layers * sum(v.tokens // self.machine.page_size for v in scene.paused)

    def _weigh(self, scene: Scene, obs: Observation) -> None:
        machine, spec = self.machine, self.spec
        context = sum(view.tokens for view in scene.decoding)
        batch = max(1, len(scene.decoding))
        scene.compute_s = max(1e-6, self.costs.compute_s(batch, context))
        scene.step_s = max(scene.compute_s, self.costs.step_s(batch, context))
        scene.hidden_pages = scene.compute_s / max(1e-12, self.costs.page_transfer_s)
        self.hidden_pages = scene.hidden_pages
        self._balance.weigh(scene, spec.has("admission"))
        rho = scene.hidden_pages / machine.main_pages
        aside = spec.has("stand-aside") and rules.stands_aside(rho, scene.mu)[0]
        if spec.streaming == "hidden":
            scene.budget_pages = min(
                rules.streaming_budget(
                    scene.hidden_pages, self._balance.pages_in_pace(scene), aside=aside
                ),
                max(0, machine.host_pages - self._held(scene)),
            )
        self.budget_pages = scene.budget_pages
        if spec.streaming == "all":
            scene.room = math.inf
        else:
            scene.room = machine.main_pages + scene.budget_pages
        everybody = [*scene.decoding, *scene.prefilling, *scene.paused, *scene.waiting]
        if sum(map(self._pages, everybody)) > scene.room:
            self._shared = [unit for unit in obs.units() if len(unit.users) > 1]
            scene.shared = self._shared
        self._returning = {v.rid: None for v in scene.paused if v.rid in self._returning}
        active = self._active(scene)
        scene.read, scene.used = sum(map(self._pages, active)), self._used(scene, active)
        scene.used += self._reserved([*scene.decoding, *scene.prefilling])

    def _reserved(self, views: Iterable[RequestView]) -> int:
        """Pages kept for all that these may still say, where nobody ever gives up KV."""
        if self.spec.overflow != "queue":
            return 0
        to_come = (max(0, view.max_new_tokens - view.generated) for view in views)
        return sum(tokens // self.machine.page_size for tokens in to_come) * self.machine.layers

    def _active(self, scene: Scene) -> list[RequestView]:
        back = [view for view in scene.paused if view.rid in self._returning]
        return [*scene.decoding, *scene.prefilling, *back]

    # --- setting aside and bringing back --------------------------------------

    def _candidate(self, view: RequestView, scene: Scene) -> Candidate:
        pace = view.slo.pace_s
        pages = view.tokens // self.machine.page_size * self.machine.layers
        return Candidate(
            rid=view.rid,
            pace_s=math.inf if pace is None else pace,
            deposit_s=view.deposit_s(scene.now),
            late=lost(view, scene),
            paced=view.slo.deposit and pace is not None and self.spec.has("deposit"),
            reload_s=pages * self.costs.page_transfer_s,
            arrival_s=view.arrival_s,
            tokens=view.tokens,
        )

    def _pausable(self, scene: Scene, gone: Sequence[str]) -> list[RequestView]:
        return [
            view
            for view in scene.decoding
            if view.pausable
            and view.generated > 0
            and view.rid not in gone
            and view.generated - self._resumed_at.get(view.rid, -MIN_RUN_STEPS) >= MIN_RUN_STEPS
        ]

    def _overflow(self, scene: Scene) -> list[str]:
        """Whom to set aside because those that decode have outgrown memory."""
        gone: list[str] = []
        if self.spec.overflow != "pause" or self.spec.streaming == "all":
            return gone
        while (
            scene.used > scene.room and len(scene.decoding) + len(scene.prefilling) - len(gone) > 1
        ):
            if len(scene.paused) + len(gone) >= self.machine.max_paused:
                break
            able = [self._candidate(view, scene) for view in self._pausable(scene, gone)]
            victim = rules.overflowing(able, self.spec.victim)
            if victim is None:
                break
            gone.append(victim.rid)
            self._set_aside(scene, gone, victim, "memory is full")
        return gone

    def _set_aside(self, scene: Scene, gone: Sequence[str], victim: Candidate, why: str) -> None:
        left = [view for view in self._active(scene) if view.rid not in gone]
        scene.read, scene.used = sum(map(self._pages, left)), self._used(scene, left)
        scene.reasons.append(f"pause {victim.rid}: {why}; ahead by {victim.deposit_s:.3f} s")

    def _wanting(self, scene: Scene) -> list[Candidacy]:
        active = {view.rid for view in self._active(scene)}
        late = self._prompts.late_in_line(scene)
        wanting = [self._newcomer(view, scene, late) for view in scene.waiting]
        for view in () if self._planned_away(scene) else scene.paused:
            if not view.settled or view.rid in self._returning:
                continue
            read = self._pages(view)
            there = sum(
                unit.pages * self.machine.layers
                for unit in scene.shared
                if view.rid in unit.users and not active.isdisjoint(unit.users)
            )
            slack, owed = rules.to_go_on(self._candidate(view, scene))
            since = scene.now if view.paused_s is None else view.paused_s
            wanting.append(
                Candidacy(view.rid, since, view.arrival_s, slack, read - there, True, owed, read)
            )
        return wanting

    def _planned_away(self, scene: Scene) -> bool:
        """Whom the authors' plan sets aside stays so until the batch changes; then all return."""
        if self.spec.streaming != "all" or not scene.decoding:
            return False
        batch = frozenset(view.rid for view in [*scene.decoding, *scene.paused])
        if batch == self._batch:
            return True
        if all(view.settled for view in scene.paused):
            self._batch = batch
        return False

    def _newcomer(self, view: RequestView, scene: Scene, late: Collection[str]) -> Candidacy:
        slack, owed = 0.0, False
        if view.first_token_s is not None:  # SGLang has retracted it
            able = self._candidate(view, scene)
            slack, owed = rules.to_go_on(able._replace(reload_s=self._prompts.left_s(view)))
        elif self.spec.has("ordering") or self.spec.has("pause"):
            slack = -1.0 if view.rid in late else self._prompts.slack_s(view, scene)
        read = self._pages(view)
        pages = read - view.shared_tokens // self.machine.page_size * self.machine.layers
        pages += self._reserved([view])
        return Candidacy(view.rid, view.arrival_s, view.arrival_s, slack, pages, False, owed, read)

    def _grant(self, scene: Scene, gone: Sequence[str]) -> list[str]:
        """Let those in as far as there is room; may set others aside for an urgent one."""
        self._ordered, self._granted = [], set()
        running = len(scene.decoding) + len(scene.prefilling) + len(self._returning) - len(gone)
        if running >= self.machine.max_running and self.spec.streaming != "all":
            return []  # the authors' plan sets others aside whoever waits
        wanting = self._wanting(scene)
        if self.spec.has("ordering"):
            ordered = rules.by_slack(wanting, self._grants)
        else:
            ordered = rules.by_arrival(wanting)
        if not (scene.decoding or scene.prefilling or self._returning):
            # Nothing runs: a newcomer may have no slots until somebody paused gives up theirs.
            ordered.sort(key=lambda wants: not wants.paused)
        self._line.ordered([wants.rid for wants in ordered if not wants.paused])
        self._ordered = ordered
        more: list[str] = []
        newcomers = True  # until one of them finds no room: then it is kept for that one
        for wants in ordered:
            if running >= self.machine.max_running:
                break
            if not wants.paused:
                newcomers = newcomers and self._affordable(scene, wants, running)
                if not newcomers:
                    continue
            if not self._fits(scene, wants, running):
                victim = self._make_way(scene, wants, [*gone, *more])
                if victim is not None:
                    more.append(victim.rid)
                    running -= 1
                    self._set_aside(scene, [*gone, *more], victim, f"{wants.rid} is urgent")
                if victim is None or not self._fits(scene, wants, running):
                    if wants.paused:
                        break
                    newcomers = False
                    continue
            running += 1
            scene.used += wants.pages
            scene.read += wants.read
            self._granted.add(wants.rid)
            if wants.paused:
                self.admitted(1)
                self._returning[wants.rid] = None
                scene.reasons.append(f"bring back {wants.rid}: slack {wants.slack_s:.3f} s")
        return more

    def _fits(self, scene: Scene, wants: Candidacy, running: int) -> bool:
        if running == 0:
            return True  # alone it decodes whatever its size
        # Who comes back is not to be set aside again at once.
        growth = self.machine.layers * running if wants.paused else 0
        return rules.fits(scene.used, wants.pages + growth, scene.room)

    def _affordable(self, scene: Scene, wants: Candidacy, running: int) -> bool:
        """Whether a newcomer leaves those on time their pace, and their turns in memory."""
        if wants.paused or running == 0 or not self.spec.has("admission"):
            return True
        # Both, for requests may be of another size than those that ended.
        if running + 1 > scene.most and not rules.fits(scene.read, wants.read, scene.sustained):
            return False
        if not self.spec.has("pause"):
            return True
        return rules.fits(self._committed(scene), wants.pages, scene.room)

    def _committed(self, scene: Scene) -> int:
        """Pages that requests with time left need of memory to stay on time."""
        shares = {view.rid: 1.0 for view in scene.prefilling}
        for view in [*scene.decoding, *scene.paused]:
            pace = view.slo.pace_s
            can_stay_away = view.phase == "paused" and pace is None
            if (can_stay_away or lost(view, scene)) and view.rid not in self._returning:
                continue
            paced = view.slo.deposit and pace is not None and self.spec.has("deposit")
            shares[view.rid] = rules.committed_share(scene.step_s, pace or 0.0, paced)
        views = [*scene.decoding, *scene.paused, *scene.prefilling]
        total = sum(self._pages(v) * shares[v.rid] for v in views if v.rid in shares)
        for unit in scene.shared:  # there while one of them is
            users = [shares[user] for user in unit.users if user in shares]
            total -= (sum(users) - max(users, default=0.0)) * unit.pages * self.machine.layers
        return int(total)

    def _make_way(self, scene: Scene, wants: Candidacy, gone: Sequence[str]) -> Candidate | None:
        """Somebody ahead of schedule who leaves for an urgent request, by the pause rule."""
        if not self.spec.has("pause") or wants.slack_s >= rules.URGENT_STEPS * scene.step_s:
            return None
        if wants.slack_s < 0 or len(scene.paused) + len(gone) >= self.machine.max_paused:
            return None
        if self.spec.has("stand-aside") and rules.stands_aside(1.0, scene.mu)[1]:
            return None
        able = [self._candidate(view, scene) for view in self._pausable(scene, gone)]
        view = next(v for v in [*scene.waiting, *scene.paused] if v.rid == wants.rid)
        pace = math.inf if view.slo.pace_s is None else view.slo.pace_s
        return rules.ahead(able, scene.step_s, pace, wants.slack_s)

    def _returns(self, scene: Scene) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Who decodes again now, and for whom pages are still fetched."""
        alone = not scene.decoding and not scene.prefilling
        resume, fetch = [], []
        budget = self._spare(scene)
        for view in scene.paused:
            if view.rid not in self._returning:
                continue
            if alone or view.missing_pages <= budget or self.spec.streaming == "all":
                resume.append(view.rid)
                self._returning.pop(view.rid)
                self._resumed_at[view.rid] = view.generated
                scene.reasons.append(f"resume {view.rid}: {view.missing_pages} pages to come")
                budget -= view.missing_pages
                alone = False
            else:
                fetch.append(view.rid)
        return tuple(resume), tuple(fetch)

    def _spare(self, scene: Scene) -> int:
        """Pages that a step can still fetch under its compute."""
        budget = int(rules.HIDDEN_SHARE * scene.hidden_pages) - self.streamed_pages
        return max(budget, int(scene.hidden_pages / 8), 1)

    def _mirror(self, scene: Scene, gone: Sequence[str]) -> tuple[str, ...]:
        """Who may be set aside next: copied to the host ahead, so that it costs nothing then."""
        if self.spec.overflow != "pause" or not (scene.paused or self._short(scene)):
            return ()
        able = self._pausable(scene, gone)
        if len(able) < 2:
            return ()
        self._mirror_steps += 1
        if self._mirror_steps < rules.GROWTH_STEPS and any(v.rid == self._mirrored for v in able):
            return (self._mirrored,)
        next_out = rules.overflowing([self._candidate(v, scene) for v in able], self.spec.victim)
        assert next_out is not None
        self._mirrored, self._mirror_steps = next_out.rid, 0
        return (self._mirrored,)

    def _short(self, scene: Scene) -> bool:
        """Whether memory, and not the pace of those that decode, keeps somebody waiting."""
        left = [w for w in self._ordered if not (w.paused or w.rid in self._granted)]
        return any(
            scene.read + w.read <= scene.sustained or scene.used + w.pages > scene.room
            for w in left
        )

    # --- prefill --------------------------------------------------------------

    def _admission(self, scene: Scene) -> tuple[tuple[str, ...] | None, frozenset[str] | None]:
        if not scene.waiting:
            return None, None
        waiting = {view.rid for view in scene.waiting}
        order = tuple(wants.rid for wants in self._ordered if wants.rid in waiting)
        if self.spec.overflow == "retract" or self.spec.streaming == "all":
            return order if self.spec.has("ordering") else None, None
        return order, frozenset(self._granted & waiting)

    def admitted(self, count: int) -> None:
        """So many requests have started. The turn of who has waited longest stays until it is
        taken: nobody else's start is counted then, nor counted past it."""
        to_turn = rules.AGEING_SHARE - 1 - self._grants % rules.AGEING_SHARE
        if to_turn:
            self._grants += min(count, to_turn)
        elif count and self._ordered and self._ordered[0].rid in self._granted:
            self._grants += 1

    # --- placement ------------------------------------------------------------

    def _place(
        self, scene: Scene, obs: Observation, gone: Sequence[str]
    ) -> tuple[dict[str, IntArray] | None, tuple[str, ...]]:
        """Where the pages of those that decode live, if that has to be said anew; and whom the
        authors' plan sets aside."""
        active = [v for v in self._active(scene) if v.rid not in gone]
        away = frozenset(v.rid for v in scene.paused if v.rid not in self._returning)
        away |= frozenset(gone)
        key = frozenset(view.rid for view in active), away
        if self.spec.overflow != "pause":
            return None, ()
        if self._used(scene, active) <= self.machine.main_pages:
            as_before = self._placed == key and self.planning.plan is None
            if as_before or (self._placed is None and not away):
                return None, ()
            self.planning.forget()
            self.streamed_pages = 0
            self._placed = key if away else None
            return {}, ()
        changed = self._placed != key or self._replan or self._plan_steps >= WINDOW_STEPS
        if not changed and not self.planning.busy:
            return None, ()

        def problem() -> PlanningProblem:
            return self.planning.problem(
                active, obs.units(), scene.compute_s, self.costs.page_transfer_s,
                None if self.spec.streaming == "all" else scene.budget_pages,
                self._held(scene), scene.now,
            )  # fmt: skip

        asks = changed or self.planning.plan is None
        plan = self.planning.ask(problem()) if asks else self.planning.news(problem)
        if plan is None:
            return None, ()
        self._placed, self._replan, self._plan_steps = key, False, 0
        self.costs.planned()
        self.streamed_pages = plan.streamed_pages
        able = {view.rid for view in scene.decoding if view.pausable and view.rid not in gone}
        room = max(0, self.machine.max_paused - len(scene.paused) - len(gone))
        set_aside = tuple(unit.id for unit in plan.units if unit.paused and unit.id in able)[:room]
        if set_aside:
            scene.reasons.append(f"pause {', '.join(set_aside)}: by the plan")
        return dict(placement_of(plan)), set_aside
