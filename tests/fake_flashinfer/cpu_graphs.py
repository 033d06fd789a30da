"""CUDA graphs on the CPU, for SGLang's own runner of decode graphs: calls are made again.

As on a GPU nothing is computed while it is captured (results are filled with NaN), every tensor
keeps its address, and what runs between two graphs is not in them. Taken place of: CUDA's graph,
what ``torch.cpu`` lacks of a device, and SGLang's choice of a runner, which has another one for
CPUs. Capture, padding, breaks and replay are SGLang's code.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for made in tree_leaves(out):
            if (
                isinstance(made, torch.Tensor)
                and made.is_floating_point()
                and _storage(made) not in given
            ):
                made.fill_(float("nan"))
        return out


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class CpuGraph:
    """``torch.cuda.CUDAGraph`` as far as SGLang's breakable graphs use it."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._recorder = _Recorder()

    def capture_begin(self, **kwargs: Any) -> None:
        self._recorder.__enter__()

    def capture_end(self) -> None:
        self._recorder.__exit__(None, None, None)

    def instantiate(self) -> None:
        pass

    def replay(self) -> None:
        for func, args, kwargs, out in self._recorder.calls:
            again = func(*args, **kwargs)
            for kept, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


def install() -> None:
    """Have the scheduler of this process capture its decode steps, on the CPU."""
    from sglang.srt.model_executor.model_runner_components import cuda_graph_setup
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import (
        breakable_cuda_graph,
    )
    from sglang.srt.platforms import current_platform

    def capture_decode_graph(*, model_runner: Any) -> Any:
        return cuda_graph_setup.GraphCapture(
            runner=DecodeCudaGraphRunner(model_runner), memory_phase="decode",
            memory_usage_gb=0, capture_time=0,
        )  # fmt: skip

    cuda_graph_setup.capture_decode_graph = capture_decode_graph
    sys.modules[
        "sglang.srt.model_executor.model_runner"
    ].capture_decode_graph = capture_decode_graph
    capabilities = msgspec.structs.replace(current_platform.capabilities, graph_capture=True)
    type(current_platform).capabilities = capabilities
    torch.cuda.CUDAGraph = CpuGraph
    torch.cpu.graph_pool_handle = lambda: (0, 0)
    torch.cpu.is_current_stream_capturing = lambda: False
    breakable_cuda_graph.get_device_module = lambda: torch.cpu
