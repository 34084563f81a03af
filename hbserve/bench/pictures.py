"""What all pictures of benchmarks need."""

from __future__ import annotations

from hbserve.errors import ConfigError


def check(option: str) -> None:
    """Refuse before anything is measured.

    Args:
        option: that asks for pictures.

    Raises:
        ConfigError: if matplotlib is not there.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(f"{option} needs matplotlib: pip install 'hbserve[bench]'") from None
    matplotlib.use("agg")
