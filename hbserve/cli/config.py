"""``hbserve config``: print the configuration of a command as YAML, with where each value came from; or check a file.

    hbserve config MODEL --mode semi_pd --port 8080 > system.yaml
    hbserve config check system.yaml

It takes the flags of ``hbserve serve``. Served again with --config, the printed file is the same system.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hbserve.cli.options import SystemParser, effective_config
from hbserve.errors import HBServeError


def main(arguments: Sequence[str] | None = None, prog: str = "hbserve config") -> int:
    """Parse the arguments, print or check; return the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if words[:1] == ["check"]:
            return _check(words[1:], f"{prog} check")
        sys.stdout.write(effective_config(SystemParser(prog, __doc__).parse(words)).as_yaml())
    except HBServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _check(words: Sequence[str], prog: str) -> int:
    from hbserve.config import load

    parser = argparse.ArgumentParser(prog=prog, description="Check a YAML file without starting anything.")
    parser.add_argument("file", metavar="FILE", help="YAML file of a system, or the name of a shipped one")
    given = parser.parse_args(words)
    config = load(given.file)
    instances = ", ".join(instance.instance_id for instance in config.gpu_instances)
    print(f"{given.file} is valid: mode {config.mode}, model {config.served_name}, instances {instances}")
    return 0
