"""``hbserve models``: list the architectures that can be served, by the names in a model's config.json."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None, prog: str = "hbserve models") -> int:
    """Print the list; return the exit code."""
    argparse.ArgumentParser(prog=prog, description=__doc__.partition(": ")[2]).parse_args(arguments)
    from hbserve.model_families.with_images import TEXT_PARTS
    from hbserve.model_spec import supported_architectures  # imports torch

    print(f"{'model_type':<16} architecture")
    for model_type, architecture in supported_architectures().items():
        print(f"{model_type:<16} {architecture}")
    print("\nof models with images, the text part:")
    for model_type, (architecture, _) in TEXT_PARTS.items():
        print(f"{model_type:<16} {architecture}")
    return 0
