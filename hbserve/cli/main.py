"""Entry of the command ``hbserve``: find the subcommand and run it.

Nothing but the subcommand's own module is imported: ``hbserve --help`` must not wait for torch.
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple

from hbserve.hints import nearest


class _Command(NamedTuple):
    """Subcommand: the module whose ``main(arguments, prog)`` runs it and returns the exit code."""

    module: str
    help: str


COMMANDS = {
    "serve": _Command("hbserve.cli.serve", "serve a model over HTTP"),
    "chat": _Command("hbserve.shell", "chat with a server, or with a model, in the terminal"),
    "top": _Command("hbserve.top", "watch a running server in the terminal"),
    "bench": _Command("hbserve.bench.__main__", "measure throughput, latency, and the highest rate within targets"),
    "batch": _Command("hbserve.cli.batch", "send a file of requests to a server, as best-effort work"),
    "simulate": _Command("hbserve.simulate.__main__", "compare systems under a load, without a GPU"),
    "plan": _Command("hbserve.cli.plan", "find the system that serves a load with the fewest GPUs"),
    "profile": _Command("hbserve.profile.__main__", "measure a model's step times on this device"),
    "join": _Command("hbserve.join", "start an instance that joins a running system"),
    "store": _Command("hbserve.cli.store", "run a store of KV blocks that hosts and systems share"),
    "config": _Command("hbserve.cli.config", "print a command's configuration, or check a file"),
    "models": _Command("hbserve.cli.models", "list the supported architectures"),
    "version": _Command("hbserve.cli.version", "print the versions of HBServe and its libraries"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    name, *others = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name not in COMMANDS:
        print(f"hbserve: error: unknown command {name!r}{nearest(name, list(COMMANDS))}", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[name].module)
    try:
        code: int = module.main(others, f"hbserve {name}")
    except KeyboardInterrupt:  # such as during a download
        return 128 + signal.SIGINT
    return code


def _usage() -> str:
    lines = [
        "usage: hbserve COMMAND ...",
        "",
        "LLM serving with prefill and decode as separate workers under one CPU scheduler.",
        "",
    ]
    lines += [f"  {name:<10} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "hbserve COMMAND --help shows the command's options."])
