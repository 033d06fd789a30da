"""The FlashInfer backend's plans and indices with the real FlashInfer."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DECODE, EXTEND, check_decode, check_extend

from orbitflow_sglang.engine.flashinfer_wrappers import Heads, PagedAttention, self_test

TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2}
DTYPES = [(one, one) for one in TOLERANCE] + [(torch.bfloat16, torch.float8_e4m3fn)]


def attention(heads: Heads, page_size: int, tensor_cores: bool) -> PagedAttention:
    from flashinfer.cascade import merge_state

    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    return PagedAttention(heads, page_size, tensor_cores, workspace, merge_state)


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES, ids=["float16", "bfloat16", "fp8 KV"])
@pytest.mark.parametrize("tensor_cores", [False, True])
@pytest.mark.parametrize("page_size", [1, 16])
def test_decode_and_extend(
    page_size: int, tensor_cores: bool, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    if kv_dtype.itemsize == 1 and not tensor_cores:
        pytest.skip("SGLang decodes over KV of 8 bits by tensor cores")
    heads = Heads(query=8, kv=2, dim=128, q_dtype=dtype, kv_dtype=kv_dtype)
    paged = attention(heads, page_size, tensor_cores)
    self_test(paged, heads, page_size)
    for tokens in DECODE:
        lengths = tokens if page_size > 1 else [min(t, 7) for t in tokens]
        check_decode(paged, heads, lengths, page_size, device="cuda", tolerance=TOLERANCE[dtype])
    for prefix in EXTEND:
        lengths = prefix if page_size > 1 else [min(t, 13) for t in prefix]
        check_extend(paged, heads, lengths, page_size, device="cuda", tolerance=TOLERANCE[dtype])
