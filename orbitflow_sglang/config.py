"""The ``--orbitflow-*`` flags, what they mean, and how they reach child processes."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

import orjson

from orbitflow_sglang.control.policies import POLICY_HELP, RULES, PolicySpec, find_policy
from orbitflow_sglang.slo import LEAST_MS, MOST_MS, SLO, TARGETS

CONFIG_ENV = "ORBITFLOW_CONFIG"
TORCH, FLASHINFER = "orbitflow_torch", "orbitflow_flashinfer"
ATTENTION_BACKENDS = {"cpu": TORCH, "cuda": FLASHINFER}  # that read KV through the page table


class ConfigError(ValueError):
    """A flag that cannot be honoured; the message names flag, reason and fix."""


@dataclass(frozen=True)
class OrbitFlowConfig:
    """What the operator asked for. None means: OrbitFlow chooses, and logs what it chose."""

    policy: str = "orbitflow"
    disable: tuple[str, ...] = ()  # rules switched off
    arena_tokens: int | None = None  # device KV per rank, in tokens resident in every layer
    arena_fraction: float | None = None  # the same as a share of what SGLang profiles
    host_memory_gb: float | None = None  # 10^9 bytes for the whole server
    ring_pages: int | None = None  # pages of one layer
    emulated_link_gb_per_s: float | None = None  # 10^9 bytes/s in each direction; CPU only
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None
    tbt_slo_ms: float | None = None
    slo_scale: float | None = None  # SLOs as a multiple of what the unloaded server takes
    token_deposit: bool = False  # paced delivery for all requests
    max_paused: int | None = None  # rows for paused requests beside max_running_requests
    profile: str | None = None  # file of a cost profile, instead of calibration
    overlap_schedule: bool = False  # GPU only: with SGLang's overlap scheduler

    def __post_init__(self) -> None:
        if self.arena_tokens is not None and self.arena_fraction is not None:
            raise ConfigError(
                "--orbitflow-arena-tokens and --orbitflow-arena-fraction set the same size: "
                "give only one of them"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{flag(field.name)} must be a number, got {value}")
        positive = (
            "arena_tokens", "arena_fraction", "emulated_link_gb_per_s",
            "ttft_slo_ms", "tpot_slo_ms", "tbt_slo_ms", "slo_scale",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{flag(name)} must be above 0, got {value}")
        for name in TARGETS:
            value = getattr(self, name)
            if value is not None and not LEAST_MS <= value <= MOST_MS:
                raise ConfigError(
                    f"{flag(name)} must be from {LEAST_MS:g} to {MOST_MS:g} ms, got {value}: leave "
                    "it out for no target"
                )
        if self.arena_fraction is not None and self.arena_fraction > 1:
            raise ConfigError(
                f"{flag('arena_fraction')} is a share of the profiled KV budget: "
                f"give at most 1, got {self.arena_fraction}"
            )
        if self.host_memory_gb is not None and self.host_memory_gb < 0:
            raise ConfigError(f"{flag('host_memory_gb')} must not be negative")
        if self.ring_pages is not None and self.ring_pages < 2:
            raise ConfigError(
                f"{flag('ring_pages')} must be at least 2: one page is read "
                f"while the next one arrives; got {self.ring_pages}"
            )
        if self.max_paused is not None and self.max_paused < 0:
            raise ConfigError(f"{flag('max_paused')} must not be negative, got {self.max_paused}")
        if self.slo_scale is not None and any(self.slo_targets_ms):
            raise ConfigError(
                f"{flag('slo_scale')} derives all targets: leave it out, or the "
                "--orbitflow-*-slo-ms flags"
            )
        try:
            find_policy(self.policy)
        except ValueError as error:
            raise ConfigError(f"{flag('policy')}: {error}") from None
        try:
            find_policy(self.policy, self.disable)
        except ValueError as error:
            raise ConfigError(f"{flag('disable')}: {error}") from None

    @property
    def slo_targets_ms(self) -> tuple[float | None, float | None, float | None]:
        """TTFT, TPOT and TBT as the flags give them."""
        return self.ttft_slo_ms, self.tpot_slo_ms, self.tbt_slo_ms

    @property
    def given_slo(self) -> SLO:
        """The targets that the flags give, without what ``slo_scale`` would derive."""
        ttft, tpot, tbt = (ms if ms is None else ms / 1e3 for ms in self.slo_targets_ms)
        return SLO(ttft, tpot, tbt, self.token_deposit)

    @property
    def policy_spec(self) -> PolicySpec:
        """The policy in force, without the disabled rules."""
        return find_policy(self.policy, self.disable)

    def export(self) -> None:
        """Hand the configuration to this process and to those it will start.

        The documented way for ``sgl.Engine``: call it before the engine is built.
        """
        os.environ[CONFIG_ENV] = orjson.dumps(asdict(self)).decode()

    @staticmethod
    def from_env() -> OrbitFlowConfig | None:
        """The configuration in force, or None where OrbitFlow is off."""
        text = os.environ.get(CONFIG_ENV)
        if not text:
            return None
        known = {field.name for field in fields(OrbitFlowConfig)}
        try:
            values = orjson.loads(text)
        except orjson.JSONDecodeError:
            values = None
        if not isinstance(values, dict) or not values.keys() <= known:
            raise ConfigError(f"{CONFIG_ENV} is not a configuration of this version: {text}")
        return OrbitFlowConfig(**values | {"disable": tuple(values.get("disable", ()))})


def flag(field: str) -> str:
    """The command-line flag that sets a field of ``OrbitFlowConfig``."""
    return "--orbitflow-" + field.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group of OrbitFlow's flags to SGLang's parser."""
    group = parser.add_argument_group(
        "orbitflow", "Keep decoding when the KV cache outgrows device memory."
    )
    group.add_argument("--enable-orbitflow", action="store_true", help="Turn OrbitFlow on.")
    group.add_argument(flag("policy"), metavar="NAME", help=POLICY_HELP)
    group.add_argument(
        flag("arena_tokens"), type=int, metavar="N",
        help="Device KV per rank, in tokens resident in every layer, ring and tails included. "
        "Default: the KV budget that SGLang profiles, bounded by --max-total-tokens.",
    )  # fmt: skip
    group.add_argument(
        flag("arena_fraction"), type=float, metavar="X",
        help="The same as a share of that budget.",
    )  # fmt: skip
    group.add_argument(
        flag("host_memory_gb"), type=float, metavar="X",
        help="Host memory for KV, 10^9 bytes for the whole server. "
        "Default: half of what is free, at most 8 arenas.",
    )  # fmt: skip
    group.add_argument(
        flag("ring_pages"), type=int, metavar="N",
        help="Staging ring, in pages of one layer. Default: an eighth of the arena; 1 / (2 layers) "
        "of it, if that is less, where at most what compute hides is streamed.",
    )  # fmt: skip
    group.add_argument(
        flag("emulated_link_gb_per_s"), type=float, metavar="X",
        help="CPU only: hold page transfers to this rate, 10^9 bytes/s in each direction.",
    )  # fmt: skip
    group.add_argument(
        flag("disable"), type=_names, metavar="RULE,...",
        help=f"Rules switched off, of {', '.join(RULES)}.",
    )  # fmt: skip
    for name, what in (
        ("ttft_slo_ms", "time to first token"),
        ("tpot_slo_ms", "mean time per output token"),
        ("tbt_slo_ms", "time between two tokens"),
    ):
        group.add_argument(
            flag(name), type=float, metavar="X",
            help=f"Target for the {what} of requests that give none of their own.",
        )  # fmt: skip
    group.add_argument(
        flag("slo_scale"), type=float, metavar="X",
        help="Targets as a multiple of the step with everything resident (TTFT: of the unloaded "
        "prefill, at least 1 s). Default: 2 when no target is given.",
    )  # fmt: skip
    group.add_argument(
        flag("token_deposit"), action="store_const", const=True,
        help="Deliver tokens at the SLO's pace while a request is ahead of it.",
    )  # fmt: skip
    group.add_argument(
        flag("max_paused"), type=int, metavar="N",
        help="Requests that may be paused, beside those that --max-running-requests lets decode "
        "together. Default: as many again.",
    )  # fmt: skip
    group.add_argument(
        flag("profile"), metavar="FILE",
        help="Cost profile of this model on this device. Default: measured at start, and cached.",
    )  # fmt: skip
    group.add_argument(
        flag("overlap_schedule"), action="store_const", const=True,
        help="GPU only, where it is off by default: SGLang's overlap scheduler.",
    )  # fmt: skip


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def from_arguments(namespace: argparse.Namespace) -> OrbitFlowConfig | None:
    """The configuration that the parsed flags ask for; None without ``--enable-orbitflow``.

    Raises ``ConfigError`` for a flag that cannot be honoured, or is given in vain.
    """
    given = {
        field.name: value
        for field in fields(OrbitFlowConfig)
        if (value := getattr(namespace, f"orbitflow_{field.name}", None)) is not None
    }
    if not getattr(namespace, "enable_orbitflow", False):
        if given:
            raise ConfigError(
                f"{flag(next(iter(given)))} has no effect: add --enable-orbitflow, or leave it out"
            )
        return None
    values: dict[str, Any] = given
    if "disable" in values:  # from Python it may be a list, or written as on the command line
        rules = values["disable"]
        values["disable"] = _names(rules) if isinstance(rules, str) else tuple(rules)
    return OrbitFlowConfig(**values)
