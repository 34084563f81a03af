"""The JSON files of profiles, and predictors that start from one.

`python -m hbserve.profile` makes such a file. The scheduler's core imports nothing from here: it reads no files.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from hbserve.errors import ConfigError
from hbserve.policy.profile_curves import ProfileCurves
from hbserve.policy.step_profile import FORMAT, StepProfile
from hbserve.policy.step_time_predictor import StepTimePredictor

BUILT_IN = Path(__file__).with_name("builtin_profile.json")


class _Version(msgspec.Struct):
    format: int


def save_profile(profile: StepProfile, path: Path) -> None:
    """Write a profile as JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")


def load_profile(path: str | Path | None) -> StepProfile:
    """Read a file that `save_profile` wrote.

    Args:
        path: None: the built-in profile, of an 8B shape on an H200. It stands in until there is one of the model and
            device at hand.

    Raises:
        ConfigError: if the file is missing, or holds no usable profile.
    """
    path = path or BUILT_IN
    try:
        text = Path(path).read_bytes()
        version = msgspec.json.decode(text, type=_Version).format
        if version != FORMAT:
            raise ConfigError(
                f"latency profile {path}: format {version}, expected {FORMAT}; make it anew with "
                "`python -m hbserve.profile`"
            )
        profile = msgspec.json.decode(text, type=StepProfile)
    except OSError as error:
        raise ConfigError(f"latency profile {path}: {error.strerror}; `python -m hbserve.profile` makes one") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"latency profile {path}: {error}") from None
    profile.check(str(path))
    return profile


def profiled_predictor(profile: StepProfile | None = None, priority: bool = True) -> StepTimePredictor:
    """Make a predictor that starts from a profile.

    Args:
        profile: None: the built-in one. If it has no points side by side, the slowdowns of the built-in one stand in.
        priority: prefill runs below decode's priority.
    """
    builtin = load_profile(None)
    return StepTimePredictor(ProfileCurves(profile or builtin, priority, stand_in=builtin))
