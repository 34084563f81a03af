"""Models by name: the shapes under ``configs/models`` have a config.json and no weights."""

from __future__ import annotations

from pathlib import Path

from hbserve.errors import ConfigError

SHAPES = Path(__file__).resolve().parents[2] / "configs" / "models"
"""Folder of the shapes that come with the repository."""


def find_model(name: str) -> Path:
    """The folder of a model: ``name`` itself if it is one, else the shape of that name.

    Raises:
        ConfigError: naming the shapes there are.
    """
    for folder in (Path(name).expanduser(), SHAPES / name):
        if (folder / "config.json").is_file():
            return folder.resolve()
    shapes = ", ".join(sorted(path.parent.name for path in SHAPES.glob("*/config.json"))) or f"none in {SHAPES}"
    raise ConfigError(f"--model: {name!r} is neither a folder with a config.json nor a known shape ({shapes})", "model")


def default_load_format(folder: Path) -> str:
    """``safetensors`` where the folder has weights, else ``dummy``."""
    return "safetensors" if any(folder.glob("*.safetensors")) else "dummy"
