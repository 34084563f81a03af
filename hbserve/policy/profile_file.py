"""The JSON files of profiles, and predictors that start from one.

`python -m hbserve.profile` makes such a file. The scheduler's core imports nothing from here: it reads no files.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec

from hbserve.errors import ConfigError
from hbserve.policy.profile_curves import ProfileCurves
from hbserve.policy.step_profile import FORMAT, StepProfile
from hbserve.policy.step_time_predictor import StepTimePredictor

logger = logging.getLogger(__name__)

BUILT_IN = Path(__file__).with_name("builtin_profile.json")


class _Version(msgspec.Struct):
    format: int


_MAX_BYTES = 4 << 20
"""Size up to which a file can be a profile; the largest that was measured has 30 kB."""


class LearntProfile(msgspec.Struct, frozen=True):
    """Where a profile that is learnt is kept: the file, and what its times are of."""

    path: str
    subject: str

    def keep(self, profile: StepProfile) -> None:
        """Write the profile, unless there is a good one meanwhile; what prevents that goes to the log."""
        path = Path(self.path)
        try:
            if path.is_file() and load_profile(path).subject in ("", self.subject):
                logger.info("learnt step times are not kept: %s is there meanwhile", path)
                return
        except ConfigError as error:
            logger.warning("it is replaced: %s", error)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_profile(msgspec.structs.replace(profile, subject=self.subject), path)
        except OSError as error:
            logger.warning("cannot keep the learnt step times in %s: %s", path, error.strerror)
            return
        logger.info("learnt step times are kept in %s; the next start begins with them", path)


def save_profile(profile: StepProfile, path: Path) -> None:
    """Write a profile as JSON: whole, or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


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
        if (size := Path(path).stat().st_size) > _MAX_BYTES:
            raise ConfigError(f"latency profile {path}: it has {size} bytes, which no profile has")
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
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
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
