"""Decode steps replayed from CUDA graphs in pieces, with attention between them.

SGLang's ``breakable`` graphs end before a marked call and go on behind it. Whatever changes with
where pages lie (indices, waits for copies, writes to the arena) happens in those calls, of the
requests that are really there; the rest of a layer, of a padded batch, is in the graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import eager_on_graph

from orbitflow_sglang.engine.attention_base import OrbitFlowBackend
from orbitflow_sglang.engine.runtime import StepInput

KEPT = ("next_token_logits", "hidden_states", "last_hidden_states")  # of a replayed step


class BetweenGraphs(OrbitFlowBackend):
    """A backend whose decode steps may be captured, and are attended outside of the graphs."""

    _capturing = False
    _requests: int | None = None  # of a padded batch that are real; None: there is no padding

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing is kept at a fixed address: no graph reads what a step looks up."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Tokens of a request that SGLang makes up, also without graphs."""
        return 1

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self._capturing, self._requests = False, None
        super().init_forward_metadata(forward_batch)

    def init_forward_metadata_out_graph(self, view: Any, in_capture: bool = False) -> None:
        """Before a replay, of SGLang's ``build_replay_fb_view``; and before a capture, whose
        requests are made up and have no pages."""
        self._capturing = in_capture
        if in_capture:
            return
        self._requests = count = view.batch_size - view.num_padding
        step = self.coming()
        if step is None:
            lengths = view.seq_lens if view.seq_lens_cpu is None else view.seq_lens_cpu
            rows, slots = view.req_pool_indices[:count].tolist(), view.out_cache_loc[:count].cpu()
            step = StepInput(rows, lengths[:count].tolist(), None, slots.numpy())
        if len(step.rows) != count:
            raise RuntimeError(f"a step of {count} requests, announced with {len(step.rows)}")
        self.begin(step)

    def shared_read_ends(self, mode: ForwardMode) -> SharedReadEnds:
        """Of what SGLang's scheduler writes for the next step while this one runs: a replayed
        decode step reads none of it once its pages are known."""
        if mode.is_decode():
            return SharedReadEnds.PRE_REPLAY
        return SharedReadEnds.UNKNOWN

    @eager_on_graph  # type: ignore[untyped-decorator]
    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``q`` is ``[requests, heads * head_dim]``, padding included; so is the result."""
        if self._capturing:
            return q.new_zeros(len(q), layer.tp_q_head_num * layer.v_head_dim)
        count = self._requests
        attended = super().forward_decode(q[:count], k[:count], v[:count], layer, *args, **kwargs)
        padding = len(q) - len(attended)
        return torch.nn.functional.pad(attended, (0, 0, 0, padding)) if padding else attended


def capture_tensors(
    original: Callable[..., None], backend: Any, key: Any, forward: Callable[[], Any], **kwargs: Any
) -> None:
    """Around ``capture_one``, which keeps tensors and tuples of them: a decode step ends in more
    (SGLang 0.5.23 refuses it; its pull request 36749)."""

    def tensors() -> Any:
        out = forward()
        if not isinstance(out, LogitsProcessorOutput):
            return out
        return tuple(getattr(out, name) for name in KEPT)

    original(backend, key, tensors, **kwargs)


def replay_tensors(original: Callable[..., Any], backend: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``replay``: the end of a decode step again."""
    out = original(backend, *args, **kwargs)
    if not isinstance(out, tuple):
        return out
    return LogitsProcessorOutput(**dict(zip(KEPT, out, strict=True)))
