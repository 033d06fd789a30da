"""Names for what a unit keeps on the host: which layers, and which pages of them.

A pattern is one term, or several joined by ``+``, each a set of layers and optionally
``@a-b`` for the unit's pages a (included) to b (excluded) of these layers:
``resident``, ``distance:d`` (1-based layer j iff j mod (d+1) = 0), ``all``,
``layers:3,7,9``, ``layers:1,5@0-120``. Whole layers have no range.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


def distance_mask(distance: int, layers: int) -> BoolArray:
    """The layers that distance d >= 1 offloads, ``[layers]``, read-only."""
    # From d = L on nothing is offloaded, and a larger d need not fit an integer.
    return _distance_mask(min(distance, layers), layers)


@cache
def _distance_mask(distance: int, layers: int) -> BoolArray:
    mask: BoolArray = np.arange(1, layers + 1) % (distance + 1) == 0
    mask.flags.writeable = False
    return mask


def widest_distances(layers: int) -> list[int]:
    """The widest distance d >= 1 for each number of offloaded layers, ascending.

    These are the authors' candidates: a smaller d with the same count needs its layers
    earlier and gains nothing.
    """
    widest = {layers // (distance + 1): distance for distance in range(1, layers)}
    return sorted(widest.values())


def pattern_name(offloaded: IntArray, pages: int) -> str:
    """The name of a unit's placement; ``offloaded``: its pages on the host, ``[layers]``.

    Pages leave from the front of a unit, so a part of a layer is the range from 0.
    """
    terms = []
    for count in sorted({int(count) for count in offloaded if count}, reverse=True):
        term = _mask_name(offloaded == count)
        terms.append(term if count == pages else f"{term}@0-{count}")
    return "+".join(terms) or "resident"


def _mask_name(mask: BoolArray) -> str:
    layers = len(mask)
    if mask.all():
        return "all"
    first = int(np.argmax(mask)) + 1
    if first > 1 and np.array_equal(mask, distance_mask(first - 1, layers)):
        return f"distance:{first - 1}"
    return "layers:" + ",".join(str(layer + 1) for layer in np.flatnonzero(mask))


def parse_pattern(name: str, layers: int, pages: int, *, clip: bool = False) -> IntArray:
    """The pages on the host in each layer, ``[layers]``. Raises ``ValueError``, with
    ``clip`` not for a range that goes beyond the unit: what is there counts."""
    offloaded = np.zeros(layers, dtype=np.int64)
    for term in name.split("+"):
        layer_set, _, page_range = term.partition("@")
        mask = _parse_mask(layer_set, layers)
        count = pages
        if page_range:
            begin, dash, end = page_range.partition("-")
            if not (dash and begin == "0" and end.isascii() and end.isdigit()):
                raise ValueError(f"{term!r}: a page range is @0-b")
            count = int(end)
            if clip:
                count = min(count, pages)
            elif not 0 < count <= pages:
                raise ValueError(f"{term!r}: the unit has {pages} pages in a layer")
        if (offloaded[mask] > 0).any():
            raise ValueError(f"{name!r} names a layer twice")
        offloaded[mask] = count
    return offloaded


def _parse_mask(name: str, layers: int) -> BoolArray:
    kind, _, argument = name.partition(":")
    if name == "resident":
        return np.zeros(layers, dtype=bool)
    if name == "all":
        return np.ones(layers, dtype=bool)
    if kind == "distance" and argument.isascii() and argument.isdigit() and int(argument) > 0:
        return distance_mask(int(argument), layers)
    numbers = argument.split(",")
    if kind == "layers" and all(number.isascii() and number.isdigit() for number in numbers):
        chosen = [int(number) for number in numbers]
        if len(set(chosen)) == len(chosen) and all(1 <= layer <= layers for layer in chosen):
            mask = np.zeros(layers, dtype=bool)
            mask[[layer - 1 for layer in chosen]] = True
            return mask
    raise ValueError(
        f"{name!r} is no set of layers 1 to {layers}: use resident, distance:d (d >= 1), all "
        "or layers:a,b,c"
    )
