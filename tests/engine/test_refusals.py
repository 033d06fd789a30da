"""What OrbitFlow cannot work with is refused at start, with flag, reason and fix."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from servers import in_full_only, run_python

from eval.bench.measure import ROOT
from eval.server import Server, ServerFailed, stock_args
from orbitflow_sglang import SUPPORTED_SGLANG, patches
from orbitflow_sglang.config import FLASHINFER, TORCH, ConfigError, OrbitFlowConfig

ORDER = {"schedule_policy": "fcfs", "enable_priority_scheduling": False}
# Of a server that works; each test changes one of them.
ACCEPTED: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": TORCH,
    "prefill_attention_backend": None,
    "decode_attention_backend": None,
    "chunked_prefill_size": 4096,
    "tokenizer_worker_num": 1,
    "enable_http2": False,
}
# A value that each rule refuses. In words of our own, and with all of them, so that a rule
# that goes missing is noticed.
SWITCHES = (
    "enable_prefill_cp",
    "enable_pdmux",
    "encoder_only",
    "language_only",
    "enable_hierarchical_cache",
    "enable_lmcache",
    "enable_flexkv",
    "enable_hisparse",
    "enable_unified_cache_external_linker",
    "enable_kv_cache_sharding",
    "enable_unified_memory",
    "enable_page_major_kv_layout",
    "enable_memory_saver",
    "enable_session_radix_cache",
    "enable_streaming_session",
    "enable_deterministic_inference",
    "enable_two_batch_overlap",
    "enable_single_batch_overlap",
    "enable_torch_compile",
    "prefill_only_disable_kv_cache",
    "use_ray",
    "smg_grpc_mode",
    "grpc_mode",
)
REFUSED: dict[str, Any] = dict.fromkeys(SWITCHES, True) | {
    "pp_size": 2,
    "attn_dp_size": 2,
    "ep_size": 2,
    "moe_dp_size": 2,
    "nnodes": 2,
    "dcp_size": 2,
    "attn_cp_size": 2,
    "scheduler_recv_interval": 4,
    "speculative_algorithm": "EAGLE",
    "disaggregation_mode": "prefill",
    "kv_canary": "log",
    "kv_cache_dtype": "mxfp8",
    "radix_cache_backend": "other",
    "dllm_algorithm": "LowConfidence",
}


def view(compat: ModuleType, **changed: Any) -> SimpleNamespace:
    """Resolved arguments that are fine, but for those ``changed``."""
    rules = (*compat._RULES, *compat._CUDA_RULES)
    fine = {field: accepted[0] for field, accepted, _ in rules}
    return SimpleNamespace(**{**fine, **ACCEPTED, **changed})


def refusal_of(compat: ModuleType, **changed: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        compat.check_arguments(view(compat, **changed))
    return str(caught.value)


# --- arguments ----------------------------------------------------------------


def test_the_arguments_that_the_other_tests_change_are_accepted(compat: ModuleType) -> None:
    compat.check_arguments(view(compat))


def test_every_rule_is_tested_here(compat: ModuleType) -> None:
    assert {field for field, _, _ in compat._RULES} == REFUSED.keys()


def test_the_documentation_names_whatever_is_refused() -> None:
    text = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    listed = text.partition("## What is refused")[2].partition("## ")[0]
    flags = {f"--{field.replace('_', '-')}" for field in (*REFUSED, *ORDER)}
    assert flags <= set(re.findall(r"`(--[a-z-]+)`", listed))


@pytest.mark.parametrize("field", REFUSED)
def test_each_rule_refuses_with_flag_reason_and_fix(compat: ModuleType, field: str) -> None:
    (reason,) = (reason for name, _, reason in compat._RULES if name == field)
    value = REFUSED[field]
    given = f"--{field.replace('_', '-')}" + ("" if value is True else f" {value}")
    assert refusal_of(compat, **{field: value}) == (
        f"--enable-orbitflow does not support {given}: {reason}. Leave out one of the two"
    )


def test_workers_of_the_tokenizer_are_refused_without_the_patch(
    compat: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "applied", lambda name: False)
    assert refusal_of(compat, tokenizer_worker_num=2) == (
        "--enable-orbitflow does not support --tokenizer-worker-num 2: SGLang does not load "
        "plugins in the processes that it starts. Patch SGLang (python -m "
        "orbitflow_sglang.patches apply), or leave the flag out"
    )
    monkeypatch.setattr(patches, "applied", lambda name: name == patches.TOKENIZER_WORKERS)
    compat.check_arguments(view(compat, tokenizer_worker_num=2))
    compat.check_arguments(view(compat, enable_http2=True))
    assert "--enable-http2 with --tokenizer-worker-num 2" in refusal_of(
        compat, tokenizer_worker_num=2, enable_http2=True
    )


def test_another_device_is_refused_with_those_there_are(
    compat: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refusal_of(compat, device="xpu")
    assert "--device xpu: there are kernels for NVIDIA GPUs and for the CPU" in message
    assert "--device cpu, with SGLANG_PLATFORM=orbitflow_native" in message
    compat.check_arguments(view(compat, device="cuda:0", attention_backend=FLASHINFER))
    monkeypatch.setattr(compat.torch.version, "hip", "6.4")  # SGLang calls it cuda as well
    assert "kernels for NVIDIA GPUs" in refusal_of(
        compat, device="cuda", attention_backend=FLASHINFER
    )


@pytest.mark.parametrize(
    ("phase", "backend", "accepted"),
    [
        ("decode", "disabled", True),
        ("decode", "breakable", True),
        ("decode", "full", False),
        ("prefill", "disabled", True),
        ("prefill", "breakable", False),
        ("prefill", "full", False),
    ],
)
def test_only_decode_steps_in_pieces_come_from_graphs_on_a_gpu(
    compat: ModuleType, phase: str, backend: str, accepted: bool
) -> None:
    asked = {f"cuda_graph_backend_{phase}": backend}
    on_gpu = {"device": "cuda", "attention_backend": FLASHINFER}
    by_json = {name: SimpleNamespace(backend="disabled") for name in ("decode", "prefill")}
    by_json[phase] = SimpleNamespace(backend=backend)
    if accepted:
        compat.check_arguments(view(compat, **on_gpu, **asked))
        compat.check_graphs(SimpleNamespace(**by_json))
        return
    message = refusal_of(compat, **on_gpu, **asked)
    assert f"--cuda-graph-backend-{phase} {backend}: a step whose KV is partly on" in message
    with pytest.raises(ConfigError, match=f"--cuda-graph-config with {phase} graphs"):
        compat.check_graphs(SimpleNamespace(**by_json))


@pytest.mark.parametrize(
    ("device", "disabled", "with_what"),
    [("cpu", False, "--device cpu"), ("cuda", True, "--disable-overlap-schedule")],
)
def test_the_overlap_scheduler_is_not_asked_for_in_vain(
    compat: ModuleType, device: str, disabled: bool, with_what: str
) -> None:
    with pytest.raises(ConfigError, match=f"--orbitflow-overlap-schedule with {with_what}"):
        compat.check_overlap(SimpleNamespace(device=device, disable_overlap_schedule=disabled))
    compat.check_overlap(SimpleNamespace(device="cuda", disable_overlap_schedule=False))


@pytest.mark.parametrize("asked", [False, True])
def test_on_a_gpu_steps_overlap_only_on_request(
    compat: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    monkeypatch.setenv("ORBITFLOW_CONFIG", json.dumps({"overlap_schedule": asked}))
    on_gpu = view(compat, device="cuda", attention_backend=FLASHINFER, page_size=64)
    declared: dict[str, Any] = {}
    monkeypatch.setattr(compat.hooks, "verify", lambda hooks: None)
    monkeypatch.setattr(compat, "resolving_view", lambda server_args: on_gpu)
    monkeypatch.setattr(compat, "_declare", lambda server_args, **fields: declared.update(fields))
    compat.choose_defaults(None, lambda server_args: None)
    assert declared.pop("disable_cuda_graph") is True
    assert declared == ({} if asked else {"disable_overlap_schedule": True})


def test_parts_of_attention_that_would_go_unheeded_are_refused(compat: ModuleType) -> None:
    compat.refuse_parts({"sinks": None})
    with pytest.raises(NotImplementedError, match="no sinks"):
        compat.refuse_parts({"sinks": torch.zeros(1), "k_rope": None})


def test_each_device_has_an_attention_backend_of_its_own(
    compat: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"not on --device cuda. Use {FLASHINFER}" in refusal_of(compat, device="cuda")
    assert f"not on --device cpu. Use {TORCH}" in refusal_of(compat, attention_backend=FLASHINFER)
    monkeypatch.setenv("ORBITFLOW_TEST_CONTROL", "resident")
    compat.check_arguments(view(compat, attention_backend=FLASHINFER))


def test_models_that_store_kv_in_another_kernel_are_told_not_to(compat: ModuleType) -> None:
    from sglang.srt.models import qwen3_moe

    asks = qwen3_moe.enable_fused_set_kv_buffer
    part = type("Part", (torch.nn.Module,), {"__module__": qwen3_moe.__name__})()
    try:
        compat.write_kv_apart(torch.nn.Sequential(part))
        assert qwen3_moe.enable_fused_set_kv_buffer is not asks
        assert qwen3_moe.enable_fused_set_kv_buffer(None) is False
    finally:
        qwen3_moe.enable_fused_set_kv_buffer = asks


@pytest.mark.parametrize(
    "field", ["attention_backend", "prefill_attention_backend", "decode_attention_backend"]
)
def test_another_attention_backend_is_refused_by_the_flag_that_chose_it(
    compat: ModuleType, field: str
) -> None:
    message = refusal_of(compat, **{field: "flashinfer"})
    assert f" --{field.replace('_', '-')} flashinfer: it does not read KV through" in message
    assert f"Use {TORCH}, or leave the flag out" in message


@pytest.mark.parametrize("size", [-1, 0])
def test_prefill_in_one_piece_is_refused(compat: ModuleType, size: int) -> None:
    message = refusal_of(compat, chunked_prefill_size=size)
    assert f"--chunked-prefill-size {size}: a prompt larger than the arena" in message


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ({"schedule_policy": "lpm"}, "--schedule-policy lpm"),
        ({"enable_priority_scheduling": True}, "--enable-priority-scheduling"),
    ],
)
def test_another_order_of_the_queue_is_refused_where_the_policy_lets_in(
    compat: ModuleType, asked: dict[str, Any], given: str
) -> None:
    ours = OrbitFlowConfig()
    compat.check_order(view(compat, **ORDER), ours)
    compat.check_order(view(compat, **ORDER | asked), OrbitFlowConfig(policy="static:1"))
    compat.check_order(view(compat, **ORDER | asked), OrbitFlowConfig(policy="paper"))
    compat.check_order(view(compat, **ORDER | asked), OrbitFlowConfig(policy="retract"))
    by_arrival = [OrbitFlowConfig(disable=("ordering",)), OrbitFlowConfig(policy="swap")]
    for config in [ours, *by_arrival, OrbitFlowConfig(policy="retract+order")]:
        with pytest.raises(ConfigError) as caught:
            compat.check_order(view(compat, **ORDER | asked), config)
        assert str(caught.value) == (
            f"--enable-orbitflow does not support {given} with --orbitflow-policy {config.policy}: "
            "it would only sort those that the policy has let in. Leave it out, or leave "
            "scheduling to SGLang (--orbitflow-policy retract)"
        )


def test_what_is_still_to_be_resolved_is_not_refused(compat: ModuleType) -> None:
    compat.check_arguments(view(compat, **dict.fromkeys(ACCEPTED)))


@pytest.mark.parametrize("variable", ["SGLANG_RUST_SERVER", "SGLANG_USE_HND_KVCACHE"])
def test_a_variable_that_changes_the_server_is_refused_by_name(
    compat: ModuleType, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "0")
    compat.check_arguments(view(compat))
    monkeypatch.setenv(variable, "True")
    assert f"does not support {variable}: " in refusal_of(compat)


def test_another_version_of_sglang_is_refused(
    compat: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    compat.check_sglang_version()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.22")
    with pytest.raises(ConfigError) as caught:
        compat.check_sglang_version()
    assert str(caught.value) == (
        f"--enable-orbitflow works with sglang {SUPPORTED_SGLANG}, found 0.5.22: "
        f"install sglang=={SUPPORTED_SGLANG}, or leave --enable-orbitflow out"
    )


# --- SGLang's own side of the rules -------------------------------------------

REAL_ARGUMENTS = """
import argparse, json, sys
from sglang.srt.arg_groups.overrides import resolved_view, resolving_view
from sglang.srt.server_args import ServerArgs
from orbitflow_sglang.engine import compat

parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
args = ServerArgs(model_path=sys.argv[1])
compat.check_arguments(resolving_view(args))
args.resolve_once()
view = resolved_view(args)
rules = [field for field, _, _ in compat._RULES]
flags = parser._option_string_actions
for field, accepted, _ in compat._RULES:
    assert getattr(view, field) in accepted, (field, getattr(view, field))
print("RESULT", json.dumps({
    "missing": [field for field in rules if field not in ServerArgs.__struct_fields__],
    "no_flag": [f for f in rules if "--" + f.replace("_", "-") not in flags],
    "takes_value": [a.dest for a in parser._actions if a.dest in rules and a.nargs != 0],
}))
"""  # fmt: skip


def test_rules_name_real_flags_and_accept_what_sglang_resolves_by_default(model: Path) -> None:
    run = run_python("-c", REAL_ARGUMENTS, str(model))
    found = re.search(r"^RESULT (.*)$", run.stdout, re.MULTILINE)
    assert found, run.stderr[-4000:]
    result = json.loads(found.group(1))
    assert result["missing"] == []
    assert result["no_flag"] == []
    assert set(result["takes_value"]) == REFUSED.keys() - set(SWITCHES)


# --- real servers -------------------------------------------------------------

SERVERS: dict[str, tuple[list[str], str]] = {
    "speculative decoding": (
        ["--enable-orbitflow", "--speculative-algorithm", "NGRAM"],
        "--enable-orbitflow does not support --speculative-algorithm NGRAM: draft and verify "
        "write several tokens at guessed slots. Leave out one of the two",
    ),
    "hierarchical cache": (
        ["--enable-orbitflow", "--enable-hierarchical-cache"],
        "--enable-orbitflow does not support --enable-hierarchical-cache: it moves KV between "
        "device and host by itself. Leave out one of the two",
    ),
    "attention backend": (
        ["--enable-orbitflow", "--attention-backend", "torch_native"],
        "--enable-orbitflow does not support --attention-backend torch_native: it does not read "
        "KV through the page table, or not on --device cpu. Use orbitflow_torch, or leave the "
        "flag out",
    ),
    "two sizes": (
        ["--enable-orbitflow", "--orbitflow-arena-tokens", "10",
         "--orbitflow-arena-fraction", "0.5"],
        "--orbitflow-arena-tokens and --orbitflow-arena-fraction set the same size: "
        "give only one of them",
    ),
    "unknown policy": (
        ["--enable-orbitflow", "--orbitflow-policy", "nonsense"],
        "--orbitflow-policy: unknown policy 'nonsense': use resident, static:d (d >= 1), "
        "all-host or random:SEED; or orbitflow, paper, swap, time-sliced-swap, queue, retract",
    ),
    "arena too small": (
        ["--enable-orbitflow", "--orbitflow-arena-tokens", "16"],
        "an arena of 8 pages leaves 6 outside the ring of 2; even one request needs 16 (two pages "
        "in each of 8 layers): raise --orbitflow-arena-tokens, or lower --orbitflow-ring-pages "
        "or --page-size",
    ),
    "flag without the switch": (
        ["--orbitflow-policy", "resident"],
        "--orbitflow-policy has no effect: add --enable-orbitflow, or leave it out",
    ),
}  # fmt: skip


IN_EVERY_RUN = ("attention backend", "flag without the switch")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in IN_EVERY_RUN else in_full_only) for name in SERVERS],
)
def test_the_last_line_of_a_server_that_is_refused_says_why(name: str, model: Path) -> None:
    args, message = SERVERS[name]
    server = Server(stock_args(model, *args))
    with pytest.raises(ServerFailed, match="ended with status 1") as caught:
        server.start()
    *_, last, whole_log = str(caught.value).splitlines()
    assert last == f"error: {message}"
    assert whole_log.startswith("(whole log")
    assert "Traceback" not in str(caught.value)
