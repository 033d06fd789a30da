"""Which symbols of SGLang are wrapped, in every process, and what happens when one is not.

SGLang loads plugins in launcher, scheduler and detokenizer. Ours to spy on them is a
second plugin: a folder with a module and the metadata of a distribution, put on the
``PYTHONPATH`` of the server.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from servers import in_full_only, run_python

from eval.server import Server, ServerFailed, stock_args
from eval.tiny_model import TinyModel, build

ARGS = ("--max-total-tokens", "4096")
ROLES = {"launcher", "run_scheduler_process", "run_detokenizer_process"}
# The documented set, written out: a row that is added to the table has to be added here.
ALWAYS = {
    "sglang.srt.server_args.ServerArgs.add_cli_args": "launcher.add_cli_args",
    "sglang.srt.server_args.ServerArgs.from_cli_args": "launcher.from_cli_args",
}
OPENAI = "sglang.srt.entrypoints.openai"
TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
TIMES = "sglang.srt.observability.req_time_stats"
DETOKENIZER = {
    f"{TIMES}.SchedulerReqTimeStats.__getstate__": "streaming.time_stats_state",
}
LAUNCHER = {
    **DETOKENIZER,
    "sglang.srt.entrypoints.engine.Engine._launch_subprocesses": "launcher.check_handshake",
    "sglang.srt.entrypoints.api_contract.generate_contract_error": (
        "requests.generate_contract_error"
    ),
    f"{OPENAI}.serving_completions.OpenAIServingCompletion._validate_request": (
        "requests.validate_openai_request"
    ),
    f"{OPENAI}.serving_chat.OpenAIServingChat._validate_request": (
        "requests.validate_openai_request"
    ),
    "sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments": (
        "requests.normalize_batch_and_arguments"
    ),
    f"{TIMES}.APIServerReqTimeStats.__getstate__": "requests.state_with_arrival",
    f"{TOKENIZER}._handle_batch_output": "streaming.handle_batch_output",
    f"{TOKENIZER}._stream_one_response": "streaming.stream_one_response",
}
CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
INTERNAL_STATE = (
    "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController"
)
IN_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
RECEIVER = "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver"
IN_CONTROLLER = "sglang.srt.managers.data_parallel_controller.DataParallelController"
STREAMER = "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
GRAPHS = (
    "sglang.srt.model_executor.runner_backend.breakable_cuda_graph_backend"
    ".BreakableCudaGraphBackend"
)
REPORTER = "sglang.srt.managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter"
METRICS = "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector"
LOADS = "sglang.srt.managers.scheduler_components.load_inquirer.SchedulerLoadInquirer"
INVARIANTS = "sglang.srt.managers.scheduler_components.invariant_checker.SchedulerInvariantChecker"
RETRACT = "sglang.srt.managers.schedule_batch.ScheduleBatch.retract_decode"
SCHEDULER = {
    f"{CONFIGURATOR}.config_from_budget": "memory.config_from_budget",
    f"{CONFIGURATOR}.resolve_max_num_reqs": "memory.resolve_max_num_reqs",
    f"{CONFIGURATOR}._resolve_kv_pool_class": "memory.resolve_pool_class",
    f"{CONFIGURATOR}._build_token_to_kv_pool_allocator": "memory.build_allocator",
    f"{CONFIGURATOR}._build_req_to_token_pool": "memory.add_rows_for_paused",
    f"{RECEIVER}._broadcast_reqs_across_ranks": "scheduler.broadcast_requests",
    f"{IN_SCHEDULER}.run_batch": "scheduler.run_batch",
    f"{IN_SCHEDULER}.get_next_batch_to_run": "scheduler.choose_next_batch",
    f"{IN_SCHEDULER}._should_defer_prefill": "scheduler.defer_prefill",
    f"{IN_SCHEDULER}.get_new_batch_prefill": "scheduler.choose_prefill",
    f"{IN_SCHEDULER}.is_fully_idle": "scheduler.is_fully_idle",
    f"{IN_SCHEDULER}.collect_inflight_reqs": "scheduler.collect_inflight",
    f"{IN_SCHEDULER}._collect_inflight_batches": "scheduler.inflight_batches",
    f"{IN_SCHEDULER}.abort_request": "scheduler.abort_request",
    f"{IN_SCHEDULER}.pause_generation": "scheduler.pause_generation",
    f"{IN_SCHEDULER}.on_idle": "scheduler.on_idle",
    f"{IN_SCHEDULER}.update_running_batch": "retraction.make_room",
    RETRACT: "retraction.retract_decode",
    f"{INVARIANTS}._requests_owning_rows": "scheduler.owners_of_rows",
    f"{LOADS}.get_loads": "scheduler.get_loads",
    "sglang.srt.managers.scheduler.dispatch_event_loop": "scheduler.dispatch_event_loop",
    f"{STREAMER}.stream_output": "scheduler.stream_output",
    f"{IN_SCHEDULER}.get_init_info": "scheduler.get_init_info",
    f"{INTERNAL_STATE}.get_internal_state": "inspection.get_internal_state",
    **DETOKENIZER,
    f"{GRAPHS}.capture_one": "graphs.capture_tensors",
    f"{GRAPHS}.replay": "graphs.replay_tensors",
    f"{METRICS}.log_stats": "metrics.log_stats",
    f"{REPORTER}._maybe_log_idle_metrics": "metrics.idle",
    f"{REPORTER}.report_decode_stats": "metrics.report_decode_stats",
}
# In a process that only several replicas have; the servers here have one.
CONTROLLER = {
    f"{IN_CONTROLLER}.launch_dp_schedulers": "launcher.watch_schedulers",
    f"{IN_CONTROLLER}.get_init_info": "launcher.controller_init_info",
    f"{TIMES}.DPControllerReqTimeStats.__getstate__": "requests.state_with_arrival",
}
TEST_CONTROL = {f"{INTERNAL_STATE}._update_handlers": "test_control.update_handlers"}
TARGETS = sorted(ALWAYS | LAUNCHER | CONTROLLER | SCHEDULER | TEST_CONTROL)

# Writes, once the trigger is there, what each target is in this process. It imports
# nothing: a module that the process has not loaded is reported as None.
PROBE = """
import json, multiprocessing, os, sys, threading, time

def register():
    threading.Thread(target=watch, daemon=True).start()

def watch():
    folder = os.environ["PROBE_FOLDER"]
    while not os.path.exists(os.path.join(folder, "trigger")):
        time.sleep(0.05)
    try:
        found = report()
    except Exception as error:
        found = {"error": repr(error)}
    name = os.path.join(folder, f"{os.getpid()}.json")
    with open(name + ".part", "w") as file:
        json.dump(found, file)
    os.rename(name + ".part", name)

def report():
    role = "launcher"
    if multiprocessing.parent_process() is not None:
        role = multiprocessing.current_process()._target.__name__
    from sglang.srt.plugins.hook_registry import HookRegistry
    targets = json.loads(os.environ["PROBE_TARGETS"])
    return {"role": role, "patched": sorted(HookRegistry._patched),
            "chains": {target: chain(target) for target in targets}}

def chain(target):
    owner, name = target.rsplit(".", 1)
    module_name, class_name = owner.rsplit(".", 1)
    module = sys.modules.get(module_name)
    holder = sys.modules.get(owner) or getattr(module, class_name, None)
    if holder is None:
        return None
    function = getattr(holder, name)
    function = getattr(function, "__func__", function)
    links = []
    while function is not None:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        links.append({
            "file": function.__code__.co_filename,
            "name": function.__code__.co_qualname,
            "holds": [f"{c.__module__}.{c.__qualname__}" for c in cells if callable(c)],
        })
        function = getattr(function, "__wrapped__", None)
    return links
"""
# In processes of one role: takes one hook away just before SGLang applies them.
SABOTEUR = """
import multiprocessing, os

def register():
    from sglang.srt.plugins.hook_registry import HookRegistry
    process = multiprocessing.current_process()
    if getattr(getattr(process, "_target", None), "__name__", "") != os.environ["SABOTAGED_ROLE"]:
        return
    apply_hooks = HookRegistry.apply_hooks
    def apply_others():
        HookRegistry._hooks.pop(os.environ["SABOTAGED"])
        apply_hooks()
    HookRegistry.apply_hooks = apply_others
"""


def second_plugin(folder: Path, source: str) -> dict[str, str]:
    """Makes an installed plugin out of ``source``; returns the environment that finds it."""
    (folder / "second_plugin.py").write_text(source)
    metadata = folder / "second_plugin-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: second-plugin\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nsecond = second_plugin:register\n"
    )
    return {"PYTHONPATH": str(folder)}


def probed(folder: Path, *args: str, **env: str) -> dict[str, dict[str, Any]]:
    """Starts a server and returns what the probe reports, by the role of the process."""
    env |= second_plugin(folder, PROBE)
    env |= {"PROBE_FOLDER": str(folder), "PROBE_TARGETS": json.dumps(TARGETS)}
    with Server(stock_args(build(TinyModel()), *ARGS, *args), env=env):
        (folder / "trigger").touch()
        deadline = time.monotonic() + 60
        while len(found := sorted(folder.glob("*.json"))) < len(ROLES):
            assert time.monotonic() < deadline, f"only {found} reported"
            time.sleep(0.1)
        reports = [json.loads(path.read_text()) for path in found]
    assert [report for report in reports if "error" in report] == []
    by_role = {report["role"]: report for report in reports}
    assert by_role.keys() == ROLES
    return by_role


@pytest.fixture(scope="module")
def stock_symbols(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Without the flag, and with test control asked for, which must then do nothing either."""
    folder = tmp_path_factory.mktemp("stock")
    return probed(folder, ORBITFLOW_TEST_CONTROL="resident")


@pytest.fixture(scope="module")
def orbitflow_symbols(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("orbitflow")
    return probed(folder, "--enable-orbitflow", "--orbitflow-arena-tokens", "2048")


def is_wrapper(link: dict[str, Any]) -> bool:
    return not link["file"].startswith(sglang_folder()) or "hook_registry" in link["file"]


def sglang_folder() -> str:
    """Where SGLang's own code lies, without importing it."""
    from importlib.util import find_spec

    spec = find_spec("sglang")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent) + os.sep


def wrapped(report: dict[str, Any]) -> dict[str, list[str]]:
    """Targets that something is around, and the functions that are, from the outside in."""
    found = {}
    for target, links in report["chains"].items():
        hooks = [
            name.removeprefix("orbitflow_sglang.engine.")
            for link in links or ()
            if is_wrapper(link)
            for name in link["holds"]
            if not name.startswith("sglang.")
        ]
        if any(is_wrapper(link) for link in links or ()):
            found[target] = hooks
    return found


def once(hooks: dict[str, str]) -> dict[str, list[str]]:
    return {target: [function] for target, function in hooks.items()}


def test_without_the_flag_only_the_command_line_is_wrapped(
    stock_symbols: dict[str, dict[str, Any]],
) -> None:
    assert wrapped(stock_symbols["launcher"]) == once(ALWAYS)
    assert stock_symbols["launcher"]["patched"] == sorted(ALWAYS)
    for role in ("run_scheduler_process", "run_detokenizer_process"):
        assert wrapped(stock_symbols[role]) == {}
        assert stock_symbols[role]["patched"] == []


def test_with_the_flag_exactly_the_documented_symbols_are_wrapped_once(
    orbitflow_symbols: dict[str, dict[str, Any]],
) -> None:
    expected: dict[str, dict[str, str]] = {
        "launcher": ALWAYS | LAUNCHER,
        "run_scheduler_process": SCHEDULER,
        "run_detokenizer_process": DETOKENIZER,
    }
    for role, hooks in expected.items():
        assert wrapped(orbitflow_symbols[role]) == once(hooks)
        assert orbitflow_symbols[role]["patched"] == sorted(hooks)


def test_inside_our_wrappers_every_symbol_is_the_one_of_stock_sglang(
    stock_symbols: dict[str, dict[str, Any]], orbitflow_symbols: dict[str, dict[str, Any]]
) -> None:
    for role in ROLES:
        for target in TARGETS:
            stock, ours = (
                symbols[role]["chains"][target] for symbols in (stock_symbols, orbitflow_symbols)
            )
            assert (stock is None) == (ours is None), (role, target)
            own = [
                [(link["file"], link["name"]) for link in links or () if not is_wrapper(link)]
                for links in (stock, ours)
            ]
            assert own[0] == own[1], (role, target)


def test_the_probe_sees_every_symbol_where_it_is_used(
    stock_symbols: dict[str, dict[str, Any]],
) -> None:
    used = {"launcher": ALWAYS | LAUNCHER, "run_scheduler_process": SCHEDULER | TEST_CONTROL}
    for role, targets in used.items():
        chains = stock_symbols[role]["chains"]
        assert [target for target in targets if not chains[target]] == []


# --- a hook that is not there -------------------------------------------------


def sabotaged(folder: Path, target: str, *flags: str, role: str = "run_scheduler_process") -> str:
    """Why a server ends whose processes of ``role`` lack the hook on ``target``."""
    env = second_plugin(folder, SABOTEUR) | {"SABOTAGED": target, "SABOTAGED_ROLE": role}
    env |= {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if flags else {}
    args = stock_args(build(TinyModel()), *ARGS, "--enable-orbitflow", *flags)
    with pytest.raises(ServerFailed) as caught:
        Server([*args, "--orbitflow-arena-tokens", "2048"], env=env).start()
    message = str(caught.value)
    assert "ended with status" in message
    assert "ended with status 0" not in message
    return message


@in_full_only
def test_a_scheduler_that_does_not_confirm_its_hooks_ends_the_server(tmp_path: Path) -> None:
    message = sabotaged(tmp_path, "sglang.srt.managers.scheduler.Scheduler.get_init_info")
    assert (
        "--enable-orbitflow: a scheduler process started without OrbitFlow's hooks; its log "
        "says why the plugin failed there. SGLANG_PLUGINS, if set, must contain orbitflow"
    ) in message


def test_a_scheduler_that_lacks_one_hook_ends_the_server_and_names_it(tmp_path: Path) -> None:
    target = "sglang.srt.managers.scheduler.Scheduler.run_batch"
    message = sabotaged(tmp_path, target)
    assert f"OrbitFlow's hook on {target} is in place 0 times instead of once" in message


DP_CONTROLLER = "run_data_parallel_controller_process"


@in_full_only
@pytest.mark.parametrize(
    ("role", "target", "reason"),
    [
        (
            "run_scheduler_process",
            "sglang.srt.managers.scheduler.Scheduler.run_batch",
            "OrbitFlow's hook on sglang.srt.managers.scheduler.Scheduler.run_batch is in place 0",
        ),
        (
            "run_scheduler_process",
            "sglang.srt.managers.scheduler.Scheduler.get_init_info",
            "a scheduler process started without OrbitFlow's hooks",
        ),
        (
            DP_CONTROLLER,
            f"{IN_CONTROLLER}.get_init_info",
            "a scheduler process started without OrbitFlow's hooks",
        ),
    ],
    ids=["one hook", "a scheduler's mark", "the controller's mark"],
)
def test_replicas_are_checked_as_one_scheduler_is(
    tmp_path: Path, role: str, target: str, reason: str
) -> None:
    assert reason in sabotaged(tmp_path, target, "--dp-size", "2", role=role)


# The tables, and for each argument what comes of applying the hooks of the command line as often
# as it says, "2,1" being all of them and the first again. In one process that forks: importing
# SGLang takes longest.
TABLES_AND_VERDICTS = """
import json
import os
import sys
from sglang.srt.plugins.hook_registry import HookRegistry
from orbitflow_sglang.engine import hooks

tables = (hooks.ALWAYS, hooks.LAUNCHER, hooks.CONTROLLER, hooks.SCHEDULER, hooks.TEST_CONTROL)
print(json.dumps([{h.target: h.function.replace(":", ".") for h in t} for t in tables]), flush=True)
for counts in sys.argv[1:]:
    if os.fork():
        os.wait()
        continue
    for count in counts.split(","):
        for hook in hooks.ALWAYS[: int(count)]:
            HookRegistry.register(hook.target, hook.resolve(), hook.kind)
    HookRegistry.apply_hooks()
    try:
        hooks.verify(hooks.ALWAYS)
        verdict = "in place"
    except SystemExit as end:
        verdict = end.code
    print(json.dumps({counts: verdict}), flush=True)
    os._exit(0)
"""


def test_the_tables_are_what_these_tests_expect_and_each_hook_is_there_once() -> None:
    run = run_python("-c", TABLES_AND_VERDICTS, "2", "1", "0", "2,1")
    assert run.returncode == 0, run.stderr
    tables, *verdicts = (json.loads(line) for line in run.stdout.splitlines() if line[0] in "[{")
    assert tables == [ALWAYS, LAUNCHER, CONTROLLER, SCHEDULER, TEST_CONTROL]
    assert verdicts == [
        {"2": "in place"},
        {"1": misplaced("from_cli_args", 0)},
        {"0": misplaced("add_cli_args", 0)},
        {"2,1": misplaced("add_cli_args", 2)},
    ]


def misplaced(name: str, times: int) -> str:
    return (
        f"OrbitFlow's hook on sglang.srt.server_args.ServerArgs.{name} is in place {times} "
        "times instead of once. Another plugin may wrap the same symbol (try "
        "SGLANG_PLUGINS=orbitflow), or SGLang has been changed (reinstall the supported version)"
    )
