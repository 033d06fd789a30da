"""What OrbitFlow refuses to run with, and the defaults it chooses for the rest.

Checked in the launcher, before any process starts: what was asked for before SGLang
looks at it, so that the refusal is ours, and again what SGLang made of it.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.arg_groups.model_override_base import model_config_of
from sglang.srt.arg_groups.overrides import declare_resolution, resolved_view, resolving_view
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.utils import get_device

from orbitflow_sglang import SUPPORTED_SGLANG, patches
from orbitflow_sglang.config import (
    ATTENTION_BACKENDS,
    FLASHINFER,
    ConfigError,
    OrbitFlowConfig,
    flag,
)
from orbitflow_sglang.engine import fields, hooks, profile_files, sizing

logger = logging.getLogger(__name__)
ResolutionHook = Callable[[Any, Callable[[Any], None]], None]

PAGE_SIZES = {"cpu": 16, "cuda": 64}

# Field of ServerArgs, the values that are fine, why others are not. The flag is the
# field's name with dashes; the fix is to leave the flag out.
_BUFFERS = "it addresses KV by its slot in a per-layer buffer, and a slot has no fixed place"
_ONE_RANK = "decisions of several such ranks are not kept in step yet"
_GROUPS = "ranks of one group would hold KV of different requests under one decision"
_EXPERTS = "experts spread over ranks have not been made to work with it"
_TIERS = "it moves KV between device and host by itself"
_UNTESTED = "it changes which KV a step reads or writes, and has not been made to work with it"
_KV_DTYPES = ("auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2")
_PROCESS = "SGLang does not load plugins in the processes that it starts"
_RULES: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("pp_size", (1,), _ONE_RANK),
    ("attn_dp_size", (1,), _GROUPS),
    ("ep_size", (1,), _EXPERTS),
    ("moe_dp_size", (1,), _EXPERTS),
    ("nnodes", (1,), _ONE_RANK),
    ("dcp_size", (1,), _ONE_RANK),
    ("attn_cp_size", (1,), _ONE_RANK),
    ("enable_prefill_cp", (False,), _ONE_RANK),
    ("scheduler_recv_interval", (1,), _ONE_RANK),
    ("speculative_algorithm", (None,), "draft and verify write several tokens at guessed slots"),
    ("disaggregation_mode", ("null",), _BUFFERS),
    ("enable_pdmux", (False,), _UNTESTED),
    ("encoder_only", (False,), "there is no KV to place"),
    ("language_only", (False,), _UNTESTED),
    ("enable_hierarchical_cache", (False,), _TIERS),
    ("enable_lmcache", (False,), _TIERS),
    ("enable_flexkv", (False,), _TIERS),
    ("enable_hisparse", (False,), _TIERS),
    ("enable_unified_cache_external_linker", (False,), _TIERS),
    ("enable_kv_cache_sharding", (False,), _BUFFERS),
    ("enable_unified_memory", (False,), _BUFFERS),
    ("enable_page_major_kv_layout", (False,), _BUFFERS),
    ("enable_memory_saver", (False,), "the arena must stay where it is"),
    ("kv_canary", ("none",), _BUFFERS),
    ("kv_cache_dtype", _KV_DTYPES, "its scales lie beside the pages, in blocks"),
    ("radix_cache_backend", (None,), _UNTESTED),
    ("enable_session_radix_cache", (False,), _UNTESTED),
    ("enable_streaming_session", (False,), _UNTESTED),
    ("enable_deterministic_inference", (False,), _UNTESTED),
    ("dllm_algorithm", (None,), _UNTESTED),
    ("enable_two_batch_overlap", (False,), _UNTESTED),
    ("enable_single_batch_overlap", (False,), _UNTESTED),
    ("enable_torch_compile", (False,), _UNTESTED),
    ("prefill_only_disable_kv_cache", (False,), "there is no KV to place"),
    ("use_ray", (False,), _PROCESS),
    ("smg_grpc_mode", (False,), _PROCESS),
    ("grpc_mode", (False,), _PROCESS),
)
_ASKS_TO_FUSE = "enable_fused_set_kv_buffer"
_NO_GRAPHS = (
    "a step whose KV is partly on the host has to be attended outside of graphs, which only "
    "--cuda-graph-backend-decode breakable does"
)
_GRAPHS = {"decode": ("breakable", "disabled"), "prefill": ("disabled",)}
_CUDA_RULES: tuple[tuple[str, tuple[Any, ...], str], ...] = tuple(
    (f"cuda_graph_backend_{phase}", (None, *accepted), _NO_GRAPHS)
    for phase, accepted in _GRAPHS.items()
)


def check_sglang_version() -> None:
    """Raise ``ConfigError`` for any SGLang but the one whose internals are known."""
    installed = importlib.metadata.version("sglang")
    if installed != SUPPORTED_SGLANG:
        raise ConfigError(
            f"--enable-orbitflow works with sglang {SUPPORTED_SGLANG}, found {installed}: "
            f"install sglang=={SUPPORTED_SGLANG}, or leave --enable-orbitflow out"
        )


def register_resolution_hooks(wrap: Callable[[ResolutionHook], ResolutionHook]) -> None:
    """Take part in SGLang's resolution of arguments; ``wrap`` decides how a refusal ends it."""
    register_resolution_hook("handle_missing_default_values")(wrap(choose_defaults))
    register_resolution_hook("handle_model_specific_adjustments")(wrap(check_model_first))
    register_resolution_hook("handle_model_capability_adjustments")(wrap(check_last))


def choose_defaults(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Fill in what the operator left open, before SGLang would.

    All plugins have been loaded by now, so the launcher's hooks must be in place.
    """
    hooks.verify(hooks.LAUNCHER)
    fields.check_asked_for(server_args)
    view = resolving_view(server_args)
    check_arguments(view)
    device = _device(view)
    if view.attention_backend is None:
        _declare(server_args, attention_backend=ATTENTION_BACKENDS[device])
    if view.page_size is None:
        _declare(server_args, page_size=PAGE_SIZES[device])
        logger.info("OrbitFlow chose --page-size %d", PAGE_SIZES[device])
    if device == "cuda":
        config = OrbitFlowConfig.from_env()
        assert config is not None
        _declare(server_args, disable_cuda_graph=True)
        if not config.overlap_schedule:
            _declare(server_args, disable_overlap_schedule=True)
        eager = view.cuda_graph_backend_decode in (None, "disabled")
        logger.warning(
            "OrbitFlow has not been measured on a GPU yet. It serves %s, and %s",
            "with the overlap scheduler"
            if config.overlap_schedule
            else f"without the overlap scheduler ({flag('overlap_schedule')}: with)",
            "without CUDA graphs (--cuda-graph-backend-decode breakable: with)"
            if eager
            else "decodes in pieces from CUDA graphs, attended between them",
        )
    previous(server_args)


def check_model_first(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Refuse a model before SGLang adjusts, or refuses, arguments for its sake."""
    check_model(model_config_of(server_args))
    previous(server_args)


def check_last(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Refuse what cannot work, once everything else is resolved."""
    previous(server_args)
    view = resolved_view(server_args)
    check_arguments(view)
    config = OrbitFlowConfig.from_env()
    assert config is not None
    layers = model_config_of(server_args).num_attention_layers
    sizing.check_sizes(config, layers, view.page_size, sizing.free_host_bytes())
    check_order(view, config)
    if config.profile is not None:
        profile_files.read_given(config.profile, layers)
    if _device(view) == "cuda":
        check_graphs(view.cuda_graph_config)
    if config.emulated_link_gb_per_s is not None and _device(view) != "cpu":
        raise _refusal(
            f"{flag('emulated_link_gb_per_s')} with --device {view.device}", "its link is real"
        )
    if config.overlap_schedule:
        check_overlap(view)


def check_arguments(view: Any) -> None:
    """Raise ``ConfigError`` that names the flag, the reason and the fix.

    What is None is still to be resolved.
    """
    device = _device(view)
    for field, accepted, reason in (*_RULES, *(_CUDA_RULES if device == "cuda" else ())):
        value = getattr(view, field)
        if value not in accepted:
            given = "" if value is True else f" {value}"
            raise _refusal(f"--{field.replace('_', '-')}{given}", reason)
    if view.tokenizer_worker_num not in (None, 1) and not patches.applied(
        patches.TOKENIZER_WORKERS
    ):
        raise ConfigError(
            f"--enable-orbitflow does not support --tokenizer-worker-num "
            f"{view.tokenizer_worker_num}: {_PROCESS}. Patch SGLang (python -m "
            "orbitflow_sglang.patches apply), or leave the flag out"
        )
    if view.enable_http2 and view.tokenizer_worker_num not in (None, 1):
        raise _refusal(
            f"--enable-http2 with --tokenizer-worker-num {view.tokenizer_worker_num}", _PROCESS
        )
    if device not in ATTENTION_BACKENDS or (device == "cuda" and torch.version.hip):
        raise ConfigError(
            f"--enable-orbitflow does not support --device {device}: there are kernels for NVIDIA "
            "GPUs and for the CPU (--device cpu, with SGLANG_PLATFORM=orbitflow_native). Use one "
            "of these, or leave --enable-orbitflow out"
        )
    usable = [ATTENTION_BACKENDS[device]]
    if os.environ.get(hooks.TEST_CONTROL_ENV):  # with something in FlashInfer's place
        usable.append(FLASHINFER)
    for field in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
        backend = getattr(view, field)
        if backend not in (None, *usable):
            raise ConfigError(
                f"--enable-orbitflow does not support --{field.replace('_', '-')} {backend}: it "
                f"does not read KV through the page table, or not on --device {device}. Use "
                f"{usable[0]}, or leave the flag out"
            )
    if view.chunked_prefill_size is not None and view.chunked_prefill_size <= 0:
        raise _refusal(
            f"--chunked-prefill-size {view.chunked_prefill_size}",
            "a prompt larger than the arena is prefilled by chunks",
        )
    for variable in ("SGLANG_RUST_SERVER", "SGLANG_USE_HND_KVCACHE"):
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "y", "on", "t"):
            raise _refusal(variable, _PROCESS if "RUST" in variable else _BUFFERS)


def check_order(view: Any, config: OrbitFlowConfig) -> None:
    """Raise ``ConfigError`` where SGLang would sort who waits behind our back: it would only see
    those that may start already, by our ordering or by who came first."""
    spec = config.policy_spec
    chooses = spec.placing is None and spec.overflow != "retract" and spec.streaming != "all"
    if not (chooses or spec.has("ordering")):
        return
    for field, accepted in (("schedule_policy", "fcfs"), ("enable_priority_scheduling", False)):
        value = getattr(view, field)
        if value != accepted:
            given = "" if value is True else f" {value}"
            raise ConfigError(
                f"--enable-orbitflow does not support --{field.replace('_', '-')}{given} with "
                f"{flag('policy')} {config.policy}: it would only sort those that the policy has "
                f"let in. Leave it out, or leave scheduling to SGLang ({flag('policy')} retract)"
            )


def check_overlap(view: Any) -> None:
    """Raise ``ConfigError`` where the overlap scheduler was asked for in vain."""
    asked = flag("overlap_schedule")
    if _device(view) == "cpu":
        raise _refusal(f"{asked} with --device cpu", "there SGLang overlaps unless told not to")
    if view.disable_overlap_schedule:
        raise _refusal(f"{asked} with --disable-overlap-schedule", "they contradict each other")


def check_graphs(resolved: Any) -> None:
    """Raise ``ConfigError`` for a graph that was asked for by SGLang's JSON, which wins."""
    for phase, accepted in _GRAPHS.items():
        backend = getattr(resolved, phase).backend
        if str(getattr(backend, "value", backend)) not in accepted:
            raise _refusal(f"--cuda-graph-config with {phase} graphs ({backend})", _NO_GRAPHS)


def _device(view: Any) -> str:
    """What SGLang serves on, also while that is still to be resolved."""
    device: str = view.device or get_device()
    return device.split(":")[0]


def check_model(model: Any) -> None:
    """Raise ``ConfigError`` when the model's KV is not plain multi-head or grouped-query."""
    text = model.hf_text_config
    layer_types = getattr(text, "layer_types", None) or ()
    kinds = {
        "multi-head latent attention": model.attention_arch == AttentionArch.MLA,
        # SGLang keeps a pool of its own for some such models only; the attention of the
        # others comes with a window, which our attention would ignore.
        "sliding-window attention": model.is_hybrid_swa or "sliding_attention" in layer_types,
        "a cap on attention logits": bool(getattr(text, "attn_logit_softcapping", None)),
        "state-space or linear-attention layers": (
            model.attention_arch == AttentionArch.SSM or mambaish_config(model) is not None
        ),
        "an encoder and a decoder": model.is_encoder_decoder,
        "multimodal input": model.is_multimodal,
        "no text generation": not model.is_generation,
        "values of another width than keys": model.v_head_dim != model.head_dim,
    }
    for kind, present in kinds.items():
        if present:
            raise ConfigError(
                f"--enable-orbitflow does not support --model-path {model.model_path}: it has "
                f"{kind}, and only plain multi-head or grouped-query decoders are supported. "
                "Serve it without --enable-orbitflow"
            )


def check_layers(model: torch.nn.Module) -> None:
    """Raise ``ConfigError`` for attention that our backends would compute without a part.

    Called on the loaded model: its configuration need not tell, its layers do.
    """
    for layer in model.modules():
        if not isinstance(layer, RadixAttention):
            continue
        kinds = {
            "a sliding window": layer.sliding_window_size > -1,
            "a cap on logits": bool(layer.logit_cap),
        }
        for kind, present in kinds.items():
            if present:
                raise ConfigError(
                    f"--enable-orbitflow does not support this model: its attention has {kind}. "
                    "Serve it without --enable-orbitflow"
                )


def refuse_parts(kwargs: dict[str, Any]) -> None:
    """Raise ``NotImplementedError`` for a part of attention that would go unheeded: sinks, say."""
    if given := sorted(name for name, value in kwargs.items() if value is not None):
        raise NotImplementedError(
            f"OrbitFlow's attention has no {', '.join(given)}: serve this model without "
            "--enable-orbitflow"
        )


def write_kv_apart(model: torch.nn.Module) -> None:
    """Have models leave it to the attention backend to store KV.

    On a GPU some of them do it in the kernel of the rotary embedding, to buffers that the pool
    does not have. They ask a function first, each under a name in its own module.
    """
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    for name in {kind.__module__ for kind in kinds}:
        if hasattr(module := sys.modules[name], _ASKS_TO_FUSE):
            setattr(module, _ASKS_TO_FUSE, lambda forward_batch: False)


def _refusal(what: str, reason: str) -> ConfigError:
    return ConfigError(
        f"--enable-orbitflow does not support {what}: {reason}. Leave out one of the two"
    )


def _declare(server_args: Any, **fields: Any) -> None:
    declare_resolution(server_args, "orbitflow", **fields)
