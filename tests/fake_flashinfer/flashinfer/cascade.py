"""Attention to two parts of a context from attention to each."""

from __future__ import annotations

import torch


def merge_state(
    v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``v`` ``[tokens, heads, dim]``, LSE ``s`` ``[tokens, heads]`` to the base 2."""
    most = torch.maximum(s_a, s_b)
    most = torch.where(torch.isinf(most), torch.zeros_like(most), most)
    a, b = torch.exp2(s_a - most), torch.exp2(s_b - most)
    total = a + b
    share = torch.where(total > 0, a / total, torch.zeros_like(total)).unsqueeze(-1)
    rest = torch.where(total > 0, b / total, torch.zeros_like(total)).unsqueeze(-1)
    merged = v_a.float() * share + v_b.float() * rest
    return merged.to(v_a.dtype), torch.log2(total) + most
