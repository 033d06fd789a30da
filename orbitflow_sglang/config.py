"""The ``--orbitflow-*`` flags, what they mean, and how they reach child processes."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

import orjson

from orbitflow_sglang.planner.policies import POLICY_HELP, make_policy

CONFIG_ENV = "ORBITFLOW_CONFIG"
ATTENTION_BACKEND = "orbitflow_torch"


class ConfigError(ValueError):
    """A flag that cannot be honoured; the message names flag, reason and fix."""


@dataclass(frozen=True)
class OrbitFlowConfig:
    """What the operator asked for. None means: OrbitFlow chooses, and logs what it chose."""

    policy: str = "resident"
    arena_tokens: int | None = None  # device KV per rank, in tokens resident in every layer
    arena_fraction: float | None = None  # the same as a share of what SGLang profiles
    host_memory_gb: float | None = None  # 10^9 bytes for the whole server
    ring_pages: int | None = None  # pages of one layer
    emulated_link_gb_per_s: float | None = None  # 10^9 bytes/s in each direction; CPU only

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
        positive = ("arena_tokens", "arena_fraction", "emulated_link_gb_per_s")
        for name in positive:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{flag(name)} must be above 0, got {value}")
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
        try:
            make_policy(self.policy)
        except ValueError as error:
            raise ConfigError(f"{flag('policy')}: {error}") from None

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
        return OrbitFlowConfig(**values)


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
        help="Staging ring, in pages of one layer. Default: an eighth of the arena.",
    )  # fmt: skip
    group.add_argument(
        flag("emulated_link_gb_per_s"), type=float, metavar="X",
        help="CPU only: hold page transfers to this rate, 10^9 bytes/s in each direction.",
    )  # fmt: skip


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
    return OrbitFlowConfig(**values)
