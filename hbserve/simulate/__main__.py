"""``python -m hbserve.simulate``: which system serves a load within its targets, without a GPU."""

from __future__ import annotations

import argparse
import sys

from hbserve.errors import HBServeError
from hbserve.simulate import command


def main() -> int:
    """Parse the arguments and run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hbserve.simulate", description=__doc__)
    command.add_arguments(parser)
    try:
        command.run(parser.parse_args())
    except HBServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
