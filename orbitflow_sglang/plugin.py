"""Entry point of ``sglang.srt.plugins``: what is wrapped in which process.

Without ``--enable-orbitflow`` that is ``ServerArgs.add_cli_args`` and
``ServerArgs.from_cli_args``, and OrbitFlow's attention backends are offered. An
unpatched ``sgl.Engine`` also learns to say what it needs to take our arguments.
"""

from __future__ import annotations

import asyncio
import os
import traceback


def register() -> None:
    """Called by SGLang in every process that it starts, before any hook is applied."""
    try:
        _register()
    except Exception:
        # SGLang would log this and serve on without OrbitFlow.
        traceback.print_exc()
        raise SystemExit("OrbitFlow's plugin failed to load; see the error above") from None


def _register() -> None:
    from sglang.srt.arg_groups.choices import add_attention_backend_choices

    from orbitflow_sglang.config import ATTENTION_BACKENDS, FLASHINFER, TORCH, OrbitFlowConfig
    from orbitflow_sglang.engine import hooks

    config = OrbitFlowConfig.from_env()
    role = hooks.child_role()
    if role == "run_detokenizer_process":
        if config is not None:
            hooks.register(hooks.DETOKENIZER)
        return
    if role == "run_data_parallel_controller_process":
        if config is not None:
            hooks.register(hooks.CONTROLLER)
        return
    add_attention_backend_choices(list(ATTENTION_BACKENDS.values()))
    if role is None:
        from orbitflow_sglang.engine import launcher

        hooks.register(hooks.ALWAYS)
        launcher.explain_engine_arguments()
        if config is not None:  # an Engine built in Python, behind OrbitFlowConfig.export()
            launcher.enable(config)
        return
    if role == hooks.TOKENIZER_WORKER:
        if config is not None:
            from orbitflow_sglang.engine import launcher

            hooks.register(hooks.REQUESTS)
            # Behind this, when SGLang has applied the hooks of all plugins.
            asyncio.get_running_loop().call_soon(launcher.verify_worker)
        return
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend(TORCH)(_torch_backend)
    register_attention_backend(FLASHINFER)(_flashinfer_backend)
    if config is not None:
        hooks.register(hooks.SCHEDULER)
        if os.environ.get(hooks.TEST_CONTROL_ENV):
            hooks.register(hooks.TEST_CONTROL)


def _torch_backend(model_runner: object) -> object:
    from orbitflow_sglang.engine.attention_torch import OrbitFlowTorchBackend

    return OrbitFlowTorchBackend(model_runner)


def _flashinfer_backend(model_runner: object) -> object:
    from orbitflow_sglang.engine.attention_flashinfer import OrbitFlowFlashInferBackend

    return OrbitFlowFlashInferBackend(model_runner)
