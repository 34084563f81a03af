"""Options of the start scripts that replace values of the YAML file."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from hbserve.config.sections import Config
from hbserve.config.yaml_file import load
from hbserve.errors import ConfigError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class _Option(NamedTuple):
    names: tuple[str, ...]
    key: str
    kind: type[Any]
    help: str


_OPTIONS = (
    _Option(("--port",), "server.port", int, "of the HTTP server; 0: any free one"),
    _Option(("--host",), "server.host", str, "of the HTTP server"),
    _Option(("--tp-size", "--tensor-parallel-size"), "model.tensor_parallel_size", int, "ranks of every instance"),
    _Option(("--num-tokenizer", "--num-tokenizers"), "server.num_tokenizers", int, "processes that encode prompts"),
    _Option(("--max-running-requests",), "performance.max_num_seqs", int, "sequences of an instance at a time"),
    _Option(("--memory-ratio",), "performance.memory_fraction", float, "share of the free memory for the KV cache"),
    _Option(("--log-level",), "logging.level", str, "least level of log lines"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options, and ``--config``, to a parser."""
    parser.add_argument("--config", required=True, help="YAML file of the system")
    for option in _OPTIONS:
        kind = {"type": str.upper, "choices": LEVELS} if option.key == "logging.level" else {"type": option.kind}
        help_text = f"{option.help}; replaces {option.key}"
        parser.add_argument(*option.names, dest=option.key, metavar="VALUE", help=help_text, **kind)


def load_with_options(arguments: argparse.Namespace) -> Config:
    """Read the file of ``--config``, with the values of the options in place of the file's.

    Raises:
        ConfigError: naming the option, or key, file and line.
    """
    given = {option.key: getattr(arguments, option.key) for option in _OPTIONS}
    overrides = {key: value for key, value in given.items() if value is not None}
    try:
        return load(arguments.config, overrides)
    except ConfigError as error:
        names = {option.key: option.names[0] for option in _OPTIONS}
        if error.key not in overrides or not str(error).startswith(error.key):
            raise
        raise ConfigError(f"{names[error.key]} {str(error).removeprefix(error.key + ': ')}", error.key) from None


def refuse_server_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End the program if options of the HTTP server are given for an instance, which has none."""
    for option in _OPTIONS:
        if option.key.startswith("server.") and getattr(arguments, option.key) is not None:
            parser.error(f"{option.names[0]} is for the HTTP server, which --instance-id does not start")
