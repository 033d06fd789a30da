"""Policies that place layers, by name, and what fits a placement to memory.

A *unit* is a set of pages that are placed together: the private pages of one
request, or a prefix that several running requests share. A placement is a boolean
array ``[units, layers]``, True where the unit's pages of that layer live on the host.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

RANDOM_PERIOD = 4  # steps that a placement of ``random`` stays in force


class Policy(Protocol):
    """Says where pages should live; ``fit`` then makes it possible."""

    name: str
    spills: bool  # whether pages ever leave the device
    period: int | None  # steps after which it wants to be asked again; None: never

    def place(self, units: int, layers: int) -> BoolArray:
        """The placement preferred for that many units, ``[units, layers]``."""


class Resident:
    """Everything on the device; admission is bounded by the arena."""

    spills = False
    period: int | None = None

    def __init__(self) -> None:
        self.name = "resident"

    def place(self, units: int, layers: int) -> BoolArray:
        return np.zeros((units, layers), dtype=bool)


class Distance:
    """The paper's pattern: layer j (1-based) is offloaded iff j mod (d+1) = 0."""

    spills = True
    period: int | None = None

    def __init__(self, distance: int) -> None:
        if distance < 1:
            raise ValueError(f"static:d needs a distance of at least 1, got {distance}")
        self.name = f"static:{distance}"
        self._distance = distance

    def place(self, units: int, layers: int) -> BoolArray:
        offloaded = np.arange(1, layers + 1) % (min(self._distance, layers) + 1) == 0
        return np.tile(offloaded, (units, 1))


class AllHost:
    """Every closed page on the host in every layer."""

    spills = True
    period: int | None = None

    def __init__(self) -> None:
        self.name = "all-host"

    def place(self, units: int, layers: int) -> BoolArray:
        return np.ones((units, layers), dtype=bool)


class Random:
    """Another random placement for every unit, every few steps."""

    spills = True
    period: int | None = RANDOM_PERIOD

    def __init__(self, seed: int) -> None:
        self.name = f"random:{seed}"
        self._random = np.random.default_rng(seed)

    def place(self, units: int, layers: int) -> BoolArray:
        share = self._random.random((units, 1))
        return self._random.random((units, layers)) < share


def make_policy(name: str) -> Policy:
    """The policy of that name. Raises ``ValueError`` that says which names there are."""
    kind, _, argument = name.partition(":")
    if name == "resident":
        return Resident()
    if name == "all-host":
        return AllHost()
    if kind in ("static", "random") and argument.isascii() and argument.isdigit():
        return Distance(int(argument)) if kind == "static" else Random(int(argument))
    raise ValueError(
        f"unknown policy {name!r}: use resident, static:d (d >= 1), all-host or random:SEED"
    )


def spread_order(layers: int) -> IntArray:
    """Layers in an order whose every prefix lies spread over the whole depth (bit reversal)."""
    bits = max(1, (layers - 1).bit_length())
    index = np.arange(1 << bits)
    reverse = np.zeros_like(index)
    for bit in range(bits):
        reverse |= ((index >> bit) & 1) << (bits - 1 - bit)
    return reverse[reverse < layers].astype(np.int64)


def fit(preferred: BoolArray, pages: IntArray, device_pages: int, host_pages: int) -> BoolArray:
    """The placement nearest to ``preferred`` that memory can hold.

    ``pages[u]`` is the number of pages of unit u in one layer. Where the resident
    part exceeds ``device_pages``, further (unit, layer) pairs are offloaded, spread
    over the depth of the model; where the rest then exceeds ``host_pages``, pairs
    come back as far as the device has room. When both are short the device wins:
    the caller admits no more than the two together hold.
    """
    placement = preferred.copy()
    layers = placement.shape[1]
    resident = int((~placement * pages[:, None]).sum())
    offloaded = int(pages.sum()) * layers - resident
    order = spread_order(layers)
    if resident > device_pages:
        _move(placement, pages, order, resident - device_pages, to_host=True)
    elif offloaded > host_pages:
        surplus = min(offloaded - host_pages, device_pages - resident)
        _move(placement, pages, order[::-1], surplus, to_host=False)
    return placement


def _move(
    placement: BoolArray, pages: IntArray, order: IntArray, wanted: int, to_host: bool
) -> None:
    """Flip (unit, layer) pairs in layer ``order`` until ``wanted`` pages have moved.

    To the host the last pair may move too much, to the device too little: what is
    on the device must fit.
    """
    ranked = placement[:, order].T.reshape(-1)  # layer by layer, all units of each
    candidates = np.flatnonzero(ranked != to_host)
    units = candidates % placement.shape[0]
    moved = np.cumsum(pages[units])
    if to_host:
        count = int(np.searchsorted(moved, wanted)) + 1
    else:
        count = int(np.searchsorted(moved, wanted, side="right"))
    chosen = candidates[:count]
    placement[chosen % placement.shape[0], order[chosen // placement.shape[0]]] = to_host
