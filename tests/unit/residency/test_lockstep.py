"""Two stores in lockstep, asked the same: where pages are must not depend on how fast copies are.

One's copies happen when somebody waits for them, the other's as soon as they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis.stateful import invariant, run_state_machine_as_test
from residency_stores import LazyQueue, make_store
from test_store_machine import EXAMPLES, StoreMachine

from orbitflow_sglang.residency import ResidencyError
from orbitflow_sglang.residency.step import LayerPass, Step
from orbitflow_sglang.residency.store import ResidencyStore
from orbitflow_sglang.residency.transfer import Transfer

TABLES = ("state", "device_page", "host_page", "want_host", "extent", "in_use", "last_used")


class EagerQueue(LazyQueue):
    """A direction of the link in which every copy has ended when it was asked for."""

    def submit(self, *args: Any) -> Transfer:
        transfer = super().submit(*args)
        self.drain()
        return transfer


class Twins(ResidencyStore):
    """A store over a lazy link that tells ``other``, over an eager one, all that it is told.

    The other's pages hold nothing: only tables are compared.
    """

    other: ResidencyStore

    def place(self, pages: np.ndarray, on_host: np.ndarray) -> None:
        super().place(pages, on_host)
        self.other.place(pages, on_host)

    def free(self, pages: np.ndarray) -> None:
        super().free(pages)
        self.other.free(pages)

    def fetch_ahead(self, pages: np.ndarray, limit: int) -> int:
        count = super().fetch_ahead(pages, limit)
        assert self.other.fetch_ahead(pages, limit) == count
        return count

    def mirror(self, pages: np.ndarray, limit: int) -> int:
        count = super().mirror(pages, limit)
        assert self.other.mirror(pages, limit) == count
        return count

    def begin_uniform(
        self, pages: np.ndarray, new_pages: np.ndarray, written: np.ndarray
    ) -> np.ndarray | None:
        ids = super().begin_uniform(pages, new_pages, written)
        others = self.other.begin_uniform(pages, new_pages, written)
        assert (ids is None) == (others is None)
        assert ids is None or others is None or np.array_equal(ids, others)
        return ids

    def begin(self, step: Step) -> None:
        self.other.reserve_pages = self.reserve_pages
        try:
            super().begin(step)
        except ResidencyError:
            with pytest.raises(ResidencyError):
                self.other.begin(step)
            raise
        self.other.begin(step)

    def write(self, layer: int, k: Any, v: Any) -> None:
        super().write(layer, k, v)
        self.other.write(layer, k, v)

    def passes(self, layer: int) -> Iterator[LayerPass]:
        for part, _ in zip(super().passes(layer), self.other.passes(layer), strict=True):
            yield part

    def end(self) -> None:
        super().end()
        self.other.end()

    def quiesce(self) -> None:
        super().quiesce()
        self.other.quiesce()

    def close(self) -> None:
        super().close()
        self.other.close()


class LockstepMachine(StoreMachine):
    """All that the store is put through, with a twin that must not drift apart."""

    def _make_store(self, **sizes: Any) -> ResidencyStore:
        sizes |= {"lazy": True, "link_bytes_per_s": None, "in_lockstep": True}
        self.lazy = True
        store = make_store(kind=Twins, **sizes)
        assert isinstance(store, Twins)
        store.other = make_store(**sizes)
        for link in ("_h2d", "_d2h"):
            setattr(store.other.engine, link, EagerQueue())
        return store

    @invariant()
    def the_same_places(self) -> None:
        if not hasattr(self, "store"):
            return
        assert isinstance(self.store, Twins)
        one, other = self.store, self.store.other
        for name in TABLES:
            assert np.array_equal(getattr(one.table, name), getattr(other.table, name)), name
        for place in ("arena", "host", "ring"):
            assert getattr(one, place).num_free == getattr(other, place).num_free, place


def test_two_stores_in_lockstep_have_the_same_tables_whatever_the_link_does() -> None:
    run_state_machine_as_test(LockstepMachine, settings=EXAMPLES)
