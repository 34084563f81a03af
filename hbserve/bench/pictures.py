"""What all pictures of benchmarks need."""

from __future__ import annotations

from pathlib import Path

from hbserve.errors import ConfigError


def check(option: str, path: Path | None = None) -> None:
    """Refuse before anything is measured.

    Args:
        option: that asks for pictures.
        path: of the one picture, if it is one; its ending says which kind.

    Raises:
        ConfigError: if matplotlib is not there, or makes no such kind.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(f"{option} needs matplotlib: pip install 'hbserve[bench]'") from None
    matplotlib.use("agg")
    if path is not None:
        from matplotlib.backend_bases import FigureCanvasBase

        kinds = sorted(FigureCanvasBase.get_supported_filetypes())
        if path.suffix.removeprefix(".") not in kinds:
            raise ConfigError(f"{option}: {path.name!r} ends in none of the kinds there are: {', '.join(kinds)}")
