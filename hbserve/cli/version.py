"""``hbserve version``: the versions of HBServe, Python, and the libraries that decide what it can do."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from importlib import metadata

from hbserve import __version__

_LIBRARIES = (
    *("torch", "transformers", "flashinfer-python", "flash-attn", "ray"),
    *("mooncake-transfer-engine-cuda13", "mooncake-transfer-engine-non-cuda"),
)


def main(arguments: Sequence[str] | None = None, prog: str = "hbserve version") -> int:
    """Print the versions; return the exit code. Nothing is imported: the packages' own files are read."""
    argparse.ArgumentParser(prog=prog, description=__doc__.partition(": ")[2]).parse_args(arguments)
    print(f"hbserve {__version__}")
    print(f"Python {platform.python_version()}")
    for name in _LIBRARIES:
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return 0
