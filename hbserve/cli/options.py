"""Flags of the commands that take a system: one for each key of the configuration, and short names for some."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin

from hbserve.cli.shortcuts import Shortcuts, gpu_list
from hbserve.config.effective import EffectiveConfig, Flag
from hbserve.config.fields import Section
from hbserve.config.foreign_names import unknown_name
from hbserve.config.keys import all_keys, parts_of
from hbserve.config.yaml_file import Document, parse_value, read
from hbserve.errors import ConfigError


class _Short(NamedTuple):
    names: tuple[str, ...]
    key: str
    help: str


_SHORT_NAMES = (
    _Short((), "mode", "auto (default), unified, disaggregated or semi_pd"),
    _Short(("--port",), "server.port", "of the HTTP server; 0: any free one"),
    _Short(("--host",), "server.host", "of the HTTP server"),
    _Short(("--tp-size", "--tensor-parallel-size"), "model.tensor_parallel_size", "GPUs of every instance"),
    _Short(("--num-tokenizer", "--num-tokenizers"), "server.num_tokenizers", "processes that encode prompts"),
    _Short(("--max-running-requests",), "performance.max_num_seqs", "sequences of an instance at a time"),
    _Short(("--memory-ratio",), "performance.memory_fraction", "share of the free memory for the KV cache"),
    _Short(("--log-level",), "logging.level", "least level of log lines"),
)


class SystemParser(argparse.ArgumentParser):
    """Parser of a command that takes a system: a model or a file, and flags for every key.

    Args:
        prog: the command, as errors name it.
    """

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=_epilog(),
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.set_defaults(flags={})
        self.add_argument("model", nargs="?", metavar="MODEL", help="the model's folder or name; replaces model.path")
        self.add_argument("--config", metavar="FILE", help="YAML file of the system, or the name of a shipped one")
        self.add_argument("--ttft-ms", type=float, metavar="MS", help="target for the time to the first token")
        self.add_argument("--tpot-ms", type=float, metavar="MS", help="target for the time per token after the first")
        self.add_argument("--no-targets", action="store_true", help="no latency targets by default")
        self.add_argument("--gpus", type=gpu_list, metavar="0,1", help="GPUs to use, one instance for each")
        for option in _SHORT_NAMES:
            self._add_key(option.names, option.key, option.help)
        for key in all_keys():
            if all(key != option.key for option in _SHORT_NAMES):
                self._add_key((), key, argparse.SUPPRESS)

    def _add_key(self, short_names: tuple[str, ...], key: str, help_text: str) -> None:
        read_value = _reader(key, all_keys()[key])
        names = (*short_names, f"--{key}")
        self.add_argument(*names, dest=key, action=_SetKey, type=read_value, metavar="VALUE", help=help_text)

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Parse the command line; an unknown flag ends the program, with a hint."""
        parsed, others = self.parse_known_args(arguments)
        for text in others:
            if text.startswith("-"):
                name = text.partition("=")[0]
                known = [option for action in self._actions for option in action.option_strings]
                self.error(f"unknown flag {name}{unknown_name(name, known, lambda key: f'--{key}')}")
        if others:
            self.error(f"one MODEL is enough: {others[0]!r} is one too many")
        return parsed

    def error(self, message: str) -> NoReturn:
        """End the program with one line, without the long usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def effective_config(arguments: argparse.Namespace) -> EffectiveConfig:
    """Read the file, and put the flags in place of its values.

    Raises:
        ConfigError: naming the flag, or key, file and line.
    """
    flags: dict[str, Flag] = dict(arguments.flags)
    if arguments.model is not None:
        if "model.path" in flags:
            raise ConfigError("MODEL and --model.path are the same; give one", "model.path")
        flags["model.path"] = Flag("MODEL", arguments.model)
    if arguments.config is None and "model.path" not in flags:
        raise ConfigError("give MODEL, the folder or name of a model, or --config FILE", "model.path")
    document = Document() if arguments.config is None else read(arguments.config)
    shortcuts = Shortcuts(
        ttft_ms=arguments.ttft_ms,
        tpot_ms=arguments.tpot_ms,
        no_targets=arguments.no_targets,
        gpus=arguments.gpus,
    )
    return EffectiveConfig.build(document, flags | shortcuts.flags(document, flags))


class _SetKey(argparse.Action):
    """Store a key's value with the flag that the user wrote."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        name, before = option or self.dest, namespace.flags.get(self.dest)
        if before is not None and before.name != name and before.value != values:
            parser.error(f"{before.name} and {name} are the same key with different values; give one")
        namespace.flags = {**namespace.flags, self.dest: Flag(name, values)}


def _reader(key: str, kind: Any) -> Callable[[str], Any]:
    """Return the function that reads a flag's text as a value of the key's type; limits are checked later."""
    kinds = parts_of(kind)
    words = [word for part in kinds if get_origin(part) is Literal for word in get_args(part)]

    def read_value(text: str) -> Any:
        if text == "null" and type(None) in kinds:
            return None
        if any(get_origin(part) is tuple or (isinstance(part, type) and issubclass(part, Section)) for part in kinds):
            try:
                return parse_value(text)
            except ConfigError as error:
                raise argparse.ArgumentTypeError(str(error)) from None
        if bool in kinds:
            if text.lower() not in ("true", "false"):
                raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
            return text.lower() == "true"
        for number in (int, float):
            if number in kinds or any(isinstance(word, number) for word in words):
                try:
                    return number(text)
                except ValueError:
                    raise argparse.ArgumentTypeError(f"must be {_NUMBERS[number]}, got {text!r}") from None
        return text.upper() if key == "logging.level" else text

    return read_value


_NUMBERS: dict[type, str] = {int: "a whole number", float: "a number"}


def _epilog() -> str:
    """Return the list of all keys, for the end of the help."""
    sections: dict[str, list[str]] = {}
    for key in all_keys():
        section, _, name = key.partition(".")
        if name:
            sections.setdefault(section, []).append(name)
    lines = ["Every key of the configuration is a flag, such as --performance.max_num_seqs 64. Lists and sections are"]
    lines += [
        "written as in YAML. The keys (docs/configuration.md explains them; hbserve config shows their values):",
        "",
    ]
    for section, names in sections.items():
        begin = f"  --{section}."
        lines += textwrap.wrap(" ".join(names), 118, initial_indent=begin, subsequent_indent=" " * 6)
    single = " ".join(f"--{key}" for key in all_keys() if "." not in key)
    return "\n".join([*lines, f"  {single}"])
