"""A plain-PyTorch CPU platform for SGLang: no ``sgl_kernel``, no AMX.

SGLang's own CPU path needs ``sgl_kernel`` built for CPU, which no registry
carries. A platform whose dispatch key is ``native`` makes every layer take its
``forward_native``, so the stock server runs wherever CPU torch does.
"""

from __future__ import annotations

import os

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

PLATFORM_NAME = "orbitflow_native"


def activate() -> str | None:
    """Entry point of ``sglang.srt.platforms``: the platform's class path, or None.

    Active when chosen by name, or where stock SGLang could not start at all.
    """
    chosen = os.environ.get("SGLANG_PLATFORM")
    if chosen == PLATFORM_NAME or (not chosen and not _stock_sglang_can_start()):
        return f"{__name__}:NativeCpuPlatform"
    return None


def _stock_sglang_can_start() -> bool:
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" or torch.accelerator.is_available():
        return True
    try:
        import sgl_kernel  # noqa: F401
    except Exception:  # a CUDA build beside CPU torch fails with more than ImportError
        return False
    return True


class NativeCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """CPU through ``forward_native`` only; no Triton, no graph capture."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def get_device(self, device_id: int | None = 0) -> str:
        # SGLang splits the default device's name at ":", which a torch.device cannot.
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def is_pin_memory_available(self, device: object = None) -> bool:
        return False

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU
