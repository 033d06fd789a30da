"""Every symbol of SGLang that OrbitFlow wraps, in one table, and the proof that it is wrapped.

SGLang logs and swallows what goes wrong when hooks are applied. A missing hook here
would mean wrong tokens, so each is looked for once it should be in place, and the
process ends if it is not there exactly once.
"""

from __future__ import annotations

import importlib
import multiprocessing
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

# Set for tests only: the policies that a running server can be switched between.
TEST_CONTROL_ENV = "ORBITFLOW_TEST_CONTROL"

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_CONTROLLER = "sglang.srt.managers.data_parallel_controller.DataParallelController"
_RECEIVER = "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver"
_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
_INTERNAL_STATE = (
    "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController"
)
_STREAMER = "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
_TIMES = "sglang.srt.observability.req_time_stats"
_TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_GRAPHS = (
    "sglang.srt.model_executor.runner_backend.breakable_cuda_graph_backend"
    ".BreakableCudaGraphBackend"
)
_OPENAI = "sglang.srt.entrypoints.openai"
_LOADS = "sglang.srt.managers.scheduler_components.load_inquirer.SchedulerLoadInquirer"
_INVARIANTS = "sglang.srt.managers.scheduler_components.invariant_checker.SchedulerInvariantChecker"
_REPORTER = "sglang.srt.managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter"
_METRICS = "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector"


@dataclass(frozen=True)
class Hook:
    """``function``, a name in ``orbitflow_sglang.engine``, around, before or after ``target``."""

    target: str
    kind: HookType
    function: str

    def resolve(self) -> Callable[..., Any]:
        module, name = self.function.split(":")
        function = getattr(importlib.import_module(f"orbitflow_sglang.engine.{module}"), name)
        assert callable(function)
        return function


# Wrapped wherever the plugin is installed: plugins load before the command line is read.
ALWAYS = (
    Hook("sglang.srt.server_args.ServerArgs.add_cli_args", HookType.AFTER, "launcher:add_cli_args"),
    Hook(
        "sglang.srt.server_args.ServerArgs.from_cli_args", HookType.AROUND, "launcher:from_cli_args"
    ),
)
# Wrapped in the detokenizer's process and in the launcher too, which may pickle anew what the
# scheduler sent. What it carries is a report only, so nobody ends the server where the hook is
# missing in the detokenizer.
DETOKENIZER = (
    Hook(
        f"{_TIMES}.SchedulerReqTimeStats.__getstate__", HookType.AFTER, "streaming:time_stats_state"
    ),
)
# Wrapped where requests come in and answers go out: in the launcher, or with
# --tokenizer-worker-num in each worker, where a patched SGLang loads plugins.
REQUESTS = (
    Hook(
        "sglang.srt.entrypoints.api_contract.generate_contract_error",
        HookType.AFTER,
        "requests:generate_contract_error",
    ),
    Hook(
        f"{_OPENAI}.serving_completions.OpenAIServingCompletion._validate_request",
        HookType.AFTER,
        "requests:validate_openai_request",
    ),
    Hook(
        f"{_OPENAI}.serving_chat.OpenAIServingChat._validate_request",
        HookType.AFTER,
        "requests:validate_openai_request",
    ),
    Hook(
        "sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments",
        HookType.BEFORE,
        "requests:normalize_batch_and_arguments",
    ),
    Hook(
        f"{_TIMES}.APIServerReqTimeStats.__getstate__",
        HookType.AFTER,
        "requests:state_with_arrival",
    ),
    Hook(f"{_TOKENIZER}._handle_batch_output", HookType.AROUND, "streaming:handle_batch_output"),
    Hook(f"{_TOKENIZER}._stream_one_response", HookType.AROUND, "streaming:stream_one_response"),
)
# Wrapped in the launcher once --enable-orbitflow has been seen.
LAUNCHER = (
    Hook(
        "sglang.srt.entrypoints.engine.Engine._launch_subprocesses",
        HookType.AFTER,
        "launcher:check_handshake",
    ),
    *REQUESTS,
    *DETOKENIZER,
)
TOKENIZER_WORKER = "subprocess_started"  # uvicorn's function for its workers
CHILDREN = (  # functions that SGLang's processes are started to run
    *("run_scheduler_process", "run_scheduler_process_with_init_pipe"),
    *("run_data_parallel_controller_process", "run_detokenizer_process"),
    *("run_multi_detokenizer_router_process", TOKENIZER_WORKER),
)
# Wrapped in the process that starts the schedulers of several replicas, and passes on requests.
CONTROLLER = (
    Hook(f"{_CONTROLLER}.launch_dp_schedulers", HookType.BEFORE, "launcher:watch_schedulers"),
    Hook(f"{_CONTROLLER}.get_init_info", HookType.AFTER, "launcher:controller_init_info"),
    Hook(
        f"{_TIMES}.DPControllerReqTimeStats.__getstate__",
        HookType.AFTER,
        "requests:state_with_arrival",
    ),
)
# Wrapped in scheduler processes of a server with OrbitFlow.
SCHEDULER = (
    Hook(f"{_CONFIGURATOR}.config_from_budget", HookType.AROUND, "memory:config_from_budget"),
    Hook(f"{_CONFIGURATOR}.resolve_max_num_reqs", HookType.AFTER, "memory:resolve_max_num_reqs"),
    Hook(f"{_CONFIGURATOR}._resolve_kv_pool_class", HookType.AROUND, "memory:resolve_pool_class"),
    Hook(
        f"{_CONFIGURATOR}._build_token_to_kv_pool_allocator",
        HookType.AROUND,
        "memory:build_allocator",
    ),
    Hook(
        f"{_CONFIGURATOR}._build_req_to_token_pool", HookType.BEFORE, "memory:add_rows_for_paused"
    ),
    Hook(
        f"{_RECEIVER}._broadcast_reqs_across_ranks", HookType.AROUND, "scheduler:broadcast_requests"
    ),
    Hook(f"{_SCHEDULER}.run_batch", HookType.AROUND, "scheduler:run_batch"),
    Hook(f"{_SCHEDULER}.get_next_batch_to_run", HookType.AROUND, "scheduler:choose_next_batch"),
    Hook(f"{_SCHEDULER}._should_defer_prefill", HookType.AROUND, "scheduler:defer_prefill"),
    Hook(f"{_SCHEDULER}.get_new_batch_prefill", HookType.AROUND, "scheduler:choose_prefill"),
    Hook(f"{_SCHEDULER}.is_fully_idle", HookType.AFTER, "scheduler:is_fully_idle"),
    Hook(f"{_SCHEDULER}.collect_inflight_reqs", HookType.AFTER, "scheduler:collect_inflight"),
    Hook(f"{_SCHEDULER}._collect_inflight_batches", HookType.AFTER, "scheduler:inflight_batches"),
    Hook(f"{_SCHEDULER}.abort_request", HookType.AFTER, "scheduler:abort_request"),
    Hook(f"{_SCHEDULER}.pause_generation", HookType.BEFORE, "scheduler:pause_generation"),
    Hook(f"{_SCHEDULER}.on_idle", HookType.BEFORE, "scheduler:on_idle"),
    Hook(f"{_SCHEDULER}.update_running_batch", HookType.BEFORE, "retraction:make_room"),
    Hook(
        "sglang.srt.managers.schedule_batch.ScheduleBatch.retract_decode",
        HookType.AFTER,
        "retraction:retract_decode",
    ),
    Hook(f"{_INVARIANTS}._requests_owning_rows", HookType.AFTER, "scheduler:owners_of_rows"),
    Hook(f"{_LOADS}.get_loads", HookType.AFTER, "scheduler:get_loads"),
    Hook(
        "sglang.srt.managers.scheduler.dispatch_event_loop",
        HookType.AROUND,
        "scheduler:dispatch_event_loop",
    ),
    Hook(f"{_STREAMER}.stream_output", HookType.BEFORE, "scheduler:stream_output"),
    Hook(f"{_SCHEDULER}.get_init_info", HookType.AFTER, "scheduler:get_init_info"),
    Hook(f"{_INTERNAL_STATE}.get_internal_state", HookType.AFTER, "inspection:get_internal_state"),
    *DETOKENIZER,
    Hook(f"{_GRAPHS}.capture_one", HookType.AROUND, "graphs:capture_tensors"),
    Hook(f"{_GRAPHS}.replay", HookType.AROUND, "graphs:replay_tensors"),
    Hook(f"{_METRICS}.log_stats", HookType.AFTER, "metrics:log_stats"),
    Hook(f"{_REPORTER}._maybe_log_idle_metrics", HookType.AFTER, "metrics:idle"),
    Hook(f"{_REPORTER}.report_decode_stats", HookType.AFTER, "metrics:report_decode_stats"),
)
# Only under ``TEST_CONTROL_ENV``.
TEST_CONTROL = (
    Hook(f"{_INTERNAL_STATE}._update_handlers", HookType.AFTER, "test_control:update_handlers"),
)


def register(hooks: tuple[Hook, ...]) -> None:
    """Hand ``hooks`` to SGLang, which applies them when all plugins have been loaded."""
    for hook in hooks:
        HookRegistry.register(hook.target, hook.resolve(), hook.kind)


def verify(hooks: tuple[Hook, ...]) -> None:
    """End the process unless each of ``hooks`` wraps its target exactly once."""
    for hook in hooks:
        if (count := occurrences(hook)) != 1:
            raise SystemExit(
                f"OrbitFlow's hook on {hook.target} is in place {count} times instead of once. "
                "Another plugin may wrap the same symbol (try SGLANG_PLUGINS=orbitflow), or SGLang "
                "has been changed (reinstall the supported version)"
            )


def occurrences(hook: Hook) -> int:
    """How often ``hook`` is found in the chain of wrappers around its target."""
    owner, name = hook.target.rsplit(".", 1)
    wrapper = getattr(pkgutil.resolve_name(owner), name)
    wrapper = getattr(wrapper, "__func__", wrapper)
    function, count = hook.resolve(), 0
    while wrapper is not None:
        cells = getattr(wrapper, "__closure__", None) or ()
        count += sum(cell.cell_contents is function for cell in cells)
        wrapper = getattr(wrapper, "__wrapped__", None)
    return count


def child_role() -> str | None:
    """What SGLang started this process to run. None in the launcher, which may itself be a child:
    of a program that builds its ``sgl.Engine`` in a process of its own."""
    target = getattr(multiprocessing.current_process(), "_target", None)
    name = getattr(target, "__name__", None)
    return name if name in CHILDREN else None
