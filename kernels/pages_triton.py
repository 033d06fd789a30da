"""The kernels of ``pages.cu`` in Triton: where there is no nvcc, and to check one by the other.

Loops are bounded by compile-time constants and masked, so that Triton's interpreter runs them
whatever the version of NumPy.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_pages_kernel(
    target, source, target_ids, source_ids, count, words, BLOCK: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    """Program p copies word block p % blocks of one page; ids and ``count`` are in memory."""
    page = tl.program_id(0)
    block = tl.program_id(1)
    pages = tl.load(count)
    origin = tl.load(source_ids + page).to(tl.int64)  # there are as many as programs
    goal = tl.load(target_ids + page).to(tl.int64)
    end = tl.where(page < pages, words, 0)
    end = tl.where(origin >= 0, end, 0)
    for step in tl.static_range(STEPS):
        word = (block * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        mask = word < end
        values = tl.load(source + origin * words + word, mask=mask)
        tl.store(target + goal * words + word, values, mask=mask)


@triton.jit
def copy_rows_kernel(
    target, source, target_ids, first_rows, count, words, words_per_row,
    BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Page i of ``target`` is made of the rows of ``source`` from ``first_rows[i]`` on."""
    page = tl.program_id(0)
    block = tl.program_id(1)
    pages = tl.load(count)
    origin = tl.load(first_rows + page).to(tl.int64) * words_per_row
    goal = tl.load(target_ids + page).to(tl.int64)
    end = tl.where(page < pages, words, 0)
    for step in tl.static_range(STEPS):
        word = (block * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        mask = word < end
        values = tl.load(source + origin + word, mask=mask)
        tl.store(target + goal * words + word, values, mask=mask)


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
