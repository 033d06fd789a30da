"""The kernels of ``pages.cu`` in Triton: where there is no nvcc, and to check one by the other.

Copies are made by as many programs as are started, however many the pages: few leave the others
of a GPU's processors to the model. Loops are ``while`` loops, which Triton's interpreter runs
whatever the version of NumPy.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _copy(target, source, words, BLOCK: tl.constexpr):
    word = 0
    while word < words:
        place = word + tl.arange(0, BLOCK)
        mask = place < words
        tl.store(target + place, tl.load(source + place, mask=mask), mask=mask)
        word += BLOCK


@triton.jit
def copy_pages_kernel(
    target, source, target_ids, source_ids, count, words, BLOCK: tl.constexpr
):  # fmt: skip
    """Program p copies page p and every so many behind it; ids and ``count`` are in memory."""
    pages = tl.load(count)
    page = tl.program_id(0)
    while page < pages:
        origin = tl.load(source_ids + page).to(tl.int64)
        goal = tl.load(target_ids + page).to(tl.int64)
        wanted = tl.where(origin >= 0, words, 0)
        _copy(target + goal * words, source + origin * words, wanted, BLOCK)
        page += tl.num_programs(0)


@triton.jit
def copy_rows_kernel(
    target, source, target_ids, first_rows, count, words, words_per_row, BLOCK: tl.constexpr
):  # fmt: skip
    """Page i of ``target`` is made of the rows of ``source`` from ``first_rows[i]`` on."""
    pages = tl.load(count)
    page = tl.program_id(0)
    while page < pages:
        origin = tl.load(first_rows + page).to(tl.int64) * words_per_row
        goal = tl.load(target_ids + page).to(tl.int64)
        _copy(target + goal * words, source + origin, words, BLOCK)
        page += tl.num_programs(0)


@triton.jit
def layer_indices_kernel(
    indices, stride, table, pages, req_to_token, row_tokens, rows, indptr, page_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``indices[layer, i] = table[layer, page]`` for a block of one request's pages."""
    block = tl.program_id(0)
    request = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    begin = tl.load(indptr + request)
    length = tl.load(indptr + request + 1) - begin
    k = block * BLOCK + tl.arange(0, BLOCK)
    mask = k < length
    row = tl.load(rows + request).to(tl.int64) * row_tokens
    logical = tl.load(req_to_token + row + k * page_size, mask=mask, other=0) // page_size
    physical = tl.load(table + layer * pages + logical, mask=mask, other=0)
    tl.store(indices + layer * stride + begin + k, physical, mask=mask)
