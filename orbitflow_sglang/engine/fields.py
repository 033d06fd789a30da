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
    wanted = config.from_arguments(record)
    if wanted is not None:
        from sglang.srt.plugins.hook_registry import HookRegistry

        from orbitflow_sglang.engine import launcher

        launcher.enable(wanted)
        HookRegistry.apply_hooks()
