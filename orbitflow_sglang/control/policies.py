"""Policies by name: which rules decide, and how layers are placed.

    NAME[+order][:no-RULE...]      orbitflow:no-pause:no-deposit, swap+order, static:3

A *placing* policy only says where pages live and leaves scheduling to SGLang. The others
are combinations of the same rules (``rules``), so that an ablation is a name or a flag.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from orbitflow_sglang.planner.policies import make_policy

RULES = (
    "streaming",
    "pause",
    "ordering",
    "admission",
    "chunking",
    "stand-aside",
    "deposit",
    "feedback",
)
ORDER_SUFFIX = "+order"
RING_SHARE = 8  # where whole layers stream, whatever compute hides
POLICY_HELP = (
    "orbitflow; paper (the authors' rule), swap and time-sliced-swap (whole requests, no "
    "streaming), queue (no offload), retract (SGLang's own), each also with +order; or layers "
    "placed by resident, static:d, all-host, random:SEED. Default: orbitflow."
)

Overflow = Literal["pause", "retract", "queue"]
Victim = Literal["ahead", "newest", "longest"]
Streaming = Literal["hidden", "none", "all"]


@dataclass(frozen=True)
class PolicySpec:
    """What the controller may do. ``placing``: only that planner policy, nothing else."""

    name: str
    rules: frozenset[str] = frozenset()
    placing: str | None = None
    streaming: Streaming = "none"  # within what compute hides, not at all, whatever does not fit
    overflow: Overflow = "pause"  # what becomes of a decoding request that has no room
    victim: Victim = "newest"
    mode: str = "orbitflow"  # of the planner

    @property
    def spills(self) -> bool:
        """Whether KV of a request ever leaves the device."""
        if self.placing is not None:
            return make_policy(self.placing).spills
        return self.overflow == "pause"

    def has(self, rule: str) -> bool:
        """Whether ``rule`` decides."""
        return rule in self.rules

    def ring_pages(self, arena_pages: int, layers: int) -> int:
        """The ring by default, in pages of one layer; none where nothing is staged."""
        if not self.spills:
            return 0
        share = RING_SHARE
        if self.placing is None and self.streaming != "all":
            share = max(share, 2 * layers)  # what compute hides is little, and over all layers
        return max(2, arena_pages // share)


_NAMED = {
    "orbitflow": PolicySpec("orbitflow", frozenset(RULES), streaming="hidden", victim="ahead"),
    "paper": PolicySpec(
        "paper", frozenset({"feedback"}), streaming="all", victim="longest", mode="paper"
    ),
    "swap": PolicySpec("swap", victim="newest"),
    "time-sliced-swap": PolicySpec(
        "time-sliced-swap",
        frozenset({"pause", "ordering", "admission", "chunking", "deposit", "feedback"}),
        victim="ahead",
    ),
    "queue": PolicySpec("queue", overflow="queue"),
    "retract": PolicySpec("retract", overflow="retract"),
}


def find_policy(name: str, disabled: Iterable[str] = ()) -> PolicySpec:
    """The policy of that name without the ``disabled`` rules.

    Raises ``ValueError`` that says which names, or rules, there are.
    """
    wanted, *ablations = name.split(":no-")
    base, plus, _ = wanted.partition(ORDER_SUFFIX)
    if plus and (wanted != base + ORDER_SUFFIX or base not in _NAMED):
        raise ValueError(f"unknown policy {name!r}: use {POLICY_HELP}")
    spec = _NAMED.get(base)
    if spec is None:
        try:
            make_policy(wanted)
        except ValueError as error:
            raise ValueError(f"{error}; or {', '.join(_NAMED)}") from None
        spec = PolicySpec(wanted, placing=wanted)
    if plus:
        spec = replace(spec, rules=spec.rules | {"ordering"})
    without = [*ablations, *disabled]
    for rule in without:
        if rule not in RULES:
            raise ValueError(f"unknown rule {rule!r}: there are {', '.join(RULES)}")
        if spec.placing is not None:
            raise ValueError(f"{spec.name} has no rules to switch off, as {rule!r} is")
    rules = spec.rules - set(without)
    if "streaming" in without:
        spec = replace(spec, streaming="none")
    label = ":no-".join([wanted, *dict.fromkeys(without)])
    return replace(spec, name=label, rules=rules)
