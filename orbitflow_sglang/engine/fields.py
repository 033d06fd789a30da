"""OrbitFlow's flags as fields of SGLang's ``ServerArgs``: what a patched SGLang asks for.

``patches/`` has SGLang append ``OrbitFlow`` to the namespaces that its record is assembled
from, so that ``sgl.Engine(enable_orbitflow=True, ...)`` takes them by name. Imported while
``sglang.srt.server_args`` is, so nothing here may import that.
"""

from __future__ import annotations

import argparse
from typing import Annotated, Any

import msgspec
from sglang.srt.arg_groups.arg_utils import Arg

from orbitflow_sglang import config


def _namespace() -> type:
    """A field for each flag, as argparse knows it; none of them given by default."""
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    declared = []
    for action in parser._actions:
        if action.dest != "help":
            # The flags themselves are in a group of their own: ``add_cli_args``.
            hint = Annotated[Any, Arg(help=action.help or "", no_cli=True)]
            declared.append((action.dest, hint, action.default))
    return msgspec.defstruct("OrbitFlow", declared, namespace={"_NS_PATH": "orbitflow"})


OrbitFlow = _namespace()
_asked_for = False  # by a record made in this process


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """SGLang's parser is being filled, with or without plugins."""
    config.add_arguments(parser)


def constructed(record: Any) -> None:
    """A ``ServerArgs`` has been made; in the launcher it may ask for OrbitFlow.

    Raises ``ConfigError`` for what cannot be honoured.
    """
    from orbitflow_sglang.engine import hooks

    if hooks.child_role() is not None:
        return
    global _asked_for
    wanted = config.from_arguments(record)
    if wanted is not None:
        from sglang.srt.plugins.hook_registry import HookRegistry

        from orbitflow_sglang.engine import launcher

        launcher.enable(wanted)
        HookRegistry.apply_hooks()
        _asked_for = True


def check_asked_for(record: Any) -> None:
    """Raise ``ConfigError`` for a server that did not ask for OrbitFlow behind one that did.

    Hooks stay for as long as the process lives, and the processes it starts would take part.
    """
    if _asked_for and not getattr(record, "enable_orbitflow", False):
        raise config.ConfigError(
            "an earlier sgl.Engine of this process had enable_orbitflow=True and this one has not, "
            "but OrbitFlow stays on in a process: give it here too, or start another process"
        )
