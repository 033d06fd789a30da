"""Hooks of the launcher: the command line, and the check that the schedulers took part."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sglang.srt import server_args as sglang_arguments
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.utils import kill_process_tree

from orbitflow_sglang import config
from orbitflow_sglang.engine import hooks

HANDSHAKE = "orbitflow"

_enabled = False
_ready = threading.Event()  # in the controller's process: all schedulers are
logger = logging.getLogger(__name__)


def add_cli_args(result: None, parser: argparse.ArgumentParser) -> None:
    """After ``ServerArgs.add_cli_args``: our group of flags; a patched SGLang has added it."""
    if not declares_fields():
        config.add_arguments(parser)


def declares_fields() -> bool:
    """Whether SGLang is patched to have our flags as fields of its ``ServerArgs``."""
    return getattr(sglang_arguments, "orbitflow_fields", None) is not None


def explain_engine_arguments() -> None:
    """Have an unpatched ``sgl.Engine`` say how it can take our arguments, not only that it
    cannot: hooks reach no constructor of its record, so its class is asked for in their place."""
    engine = sys.modules.get("sglang.srt.entrypoints.engine")
    if engine is None or declares_fields():
        return
    original = engine.Engine.server_args_class

    def construct(**kwargs: Any) -> Any:
        ours = [name for name in kwargs if name.startswith(("enable_orbitflow", "orbitflow_"))]
        if ours:
            raise config.ConfigError(
                f"sgl.Engine takes {ours[0]} only from a patched SGLang: run `python -m "
                "orbitflow_sglang.patches apply`, or call OrbitFlowConfig(...).export() before"
            )
        return original(**kwargs)

    engine.Engine.server_args_class = staticmethod(construct)


def from_cli_args(original: Callable[..., Any], cls: type, namespace: argparse.Namespace) -> Any:
    """Around ``ServerArgs.from_cli_args``: turns OrbitFlow on when the flag is there."""
    with _refusal_ends_the_process():
        wanted = config.from_arguments(namespace)
        if wanted is None and config.CONFIG_ENV in os.environ:
            raise config.ConfigError(
                f"{config.CONFIG_ENV} is set but --enable-orbitflow is not given: "
                "unset it, or add the flag"
            )
        if wanted is not None:
            enable(wanted, command_line=True)
            HookRegistry.apply_hooks()
    return original(cls, namespace)


@contextmanager
def _refusal_ends_the_process() -> Iterator[None]:
    """One line instead of a traceback, as argparse does it."""
    try:
        yield
    except config.ConfigError as error:
        raise SystemExit(f"error: {error}") from None


def enable(wanted: config.OrbitFlowConfig, command_line: bool = False) -> None:
    """Turn OrbitFlow on in the launcher and in the processes that it will start.

    Arguments that it cannot work with end the process where they come from a
    ``command_line``; elsewhere ``ConfigError`` is raised. The hooks are only registered
    here: while plugins are still being loaded it is SGLang that applies them, or those
    of a later plugin would be left out.
    """
    from orbitflow_sglang.engine import compat

    global _enabled
    compat.check_sglang_version()
    wanted.export()
    if not _enabled:
        _enabled = True
        hooks.register(hooks.LAUNCHER)
        compat.register_resolution_hooks(
            _refusal_ends_the_process() if command_line else lambda hook: hook
        )


def check_handshake(result: Any, *args: Any, **kwargs: Any) -> None:
    """After ``Engine._launch_subprocesses``: launcher and schedulers must all be hooked."""
    try:
        hooks.verify(hooks.LAUNCHER)
    except SystemExit:
        kill_process_tree(os.getpid(), include_parent=False)
        raise
    scheduler_infos = result[3].scheduler_infos
    if not all(info.get(HANDSHAKE) for info in scheduler_infos):
        kill_process_tree(os.getpid(), include_parent=False)
        raise SystemExit(
            "--enable-orbitflow: a scheduler process started without OrbitFlow's hooks; its log "
            "says why the plugin failed there. SGLANG_PLUGINS, if set, must contain orbitflow"
        )


# --- in a worker of --tokenizer-worker-num ---------------------------------------


def verify_worker() -> None:
    """End the server unless this worker checks and paces requests as the others do."""
    try:
        hooks.verify(hooks.REQUESTS)
    except SystemExit as error:
        logger.error("OrbitFlow: %s", error)
        # Its supervisor would start another worker, and another.
        kill_process_tree(os.getppid())


# --- in the process of the data-parallel controller ----------------------------


def watch_schedulers(dp_controller: Any, server_args: Any, port_args: Any) -> None:
    """Before ``launch_dp_schedulers``: a scheduler that ends before it is ready ends the server.

    The controller would wait forever for its report.
    """

    def watch() -> None:
        while not _ready.wait(0.5):
            for process in list(dp_controller.scheduler_procs):
                if process.exitcode is not None:
                    logger.error(
                        "OrbitFlow: scheduler %d ended with status %s before it was ready; its "
                        "log above says why", process.pid, process.exitcode,
                    )  # fmt: skip
                    os._exit(1)  # the launcher sees that, and the other schedulers too

    threading.Thread(target=watch, name="orbitflow-watch", daemon=True).start()


def controller_init_info(info: dict[str, Any], dp_controller: Any) -> dict[str, Any]:
    """After ``DataParallelController.get_init_info``: what all schedulers said, for the launcher.

    SGLang passes on what the replicas agree on, and nothing of what plugins add.
    """
    hooks.verify(hooks.CONTROLLER)
    _ready.set()
    found = dp_controller._scheduler_init_infos
    expected = dp_controller.launch_dp_size
    return {**info, HANDSHAKE: len(found) >= expected and all(i.get(HANDSHAKE) for i in found)}
