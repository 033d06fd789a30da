"""The copy of the table that a device holds, against the table itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orbitflow_sglang.engine.page_rows import HostRows, MirroredRows

pytestmark = pytest.mark.unit

ROWS, TOKENS = 4, 12


class Pool:
    """SGLang's ``ReqToTokenPool``, as far as it is used."""

    def __init__(self) -> None:
        self.req_to_token = torch.zeros((ROWS, TOKENS), dtype=torch.int32)

    def write(self, indices: Any, values: torch.Tensor) -> None:
        self.req_to_token[indices] = values


def slots(pages: list[int], tokens: int, size: int) -> torch.Tensor:
    each = [page * size + offset for page in pages for offset in range(size)]
    return torch.tensor(each[:tokens], dtype=torch.int32)


@given(st.data())
def test_the_copy_says_what_the_table_says(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 2, 4]))
    pool = Pool()
    table, copy = HostRows(pool, size), MirroredRows(pool, size)
    lengths = [0] * ROWS
    pages = st.lists(st.integers(0, 99), min_size=TOKENS // size, max_size=TOKENS // size)
    kinds = st.lists(st.sampled_from(["prefill", "decode", "rewrite", "ask"]), min_size=1)
    for kind in [*data.draw(kinds), "ask"]:
        row = data.draw(st.integers(0, ROWS - 1))
        if kind == "prefill":  # by a kernel, which no method tells; then the step begins
            lengths[row] = data.draw(st.integers(1, TOKENS))
            written = slots(data.draw(pages), lengths[row], size)
            pool.req_to_token[row, : lengths[row]] = written
            copy.written([row], [lengths[row]])
        elif kind == "decode" and 0 < lengths[row] < TOKENS:
            at = lengths[row]
            tail = int(pool.req_to_token[row, at - 1]) // size
            slot = (tail if at % size else data.draw(st.integers(0, 99))) * size + at % size
            pool.write((torch.tensor([row]), torch.tensor([at])), torch.tensor([slot]).int())
            lengths[row] += 1
            copy.appended([row], [lengths[row]], np.array([slot]))
        elif kind == "rewrite" and lengths[row] >= size:
            whole = lengths[row] // size * size
            begin = data.draw(st.integers(0, whole // size - 1)) * size
            new = slots(data.draw(pages), whole, size)
            pool.write((row, slice(begin, whole)), new[begin:])
        for asked in range(ROWS if kind == "ask" else 0):
            found, wanted = copy.pages(asked, lengths[asked]), table.pages(asked, lengths[asked])
            assert np.array_equal(found, wanted) and found.dtype == np.int32


class Reads:
    """The table on its device, with a count of the reads, each of which waits for the device."""

    device = torch.device("cpu")
    shape = (ROWS, TOKENS)

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, index: Any) -> torch.Tensor:
        self.count += 1
        return torch.zeros(self.shape, dtype=torch.int32)[index]


def test_the_device_is_waited_for_when_a_step_is_announced_and_once() -> None:
    pool = Pool()
    pool.req_to_token = table = Reads()  # type: ignore[assignment]
    pool.write = lambda indices, values: None  # type: ignore[method-assign]
    copy = MirroredRows(pool, 2)
    copy.written([1, 2, 3], [4, 12, 1])
    assert table.count == 1
    copy.appended([1, 2], [5, 12], np.array([16, 19]))
    for row, tokens in ((1, 5), (2, 12), (3, 1)):
        copy.pages(row, tokens)
    assert table.count == 1, "an appended token has told its page"
    assert copy.pages(1, 5)[-1] == 8
    pool.write((3, slice(0, 1)), torch.zeros(1))  # the radix tree had it
    copy.appended([1], [6], np.array([17]))
    copy.pages(3, 1)
    assert table.count == 2
    found = copy.pages(1, 4)
    found[:] = 7
    assert (copy.pages(1, 4) == 0).all(), "the caller's own"
