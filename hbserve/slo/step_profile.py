"""Measured step times of one model on one device, and the only reader and writer of their JSON file.

`python -m hbserve.profile` makes such a file; `hbserve.slo.step_times.StepTimes` interpolates between its points.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from hbserve.errors import ConfigError

FORMAT = 1
BUILTIN_PROFILE = Path(__file__).with_name("builtin_profile.json")
"""Profile of an 8B shape on an H200. It stands in until there is one of the model and device at hand."""


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class PrefillPoint(_Part, frozen=True, kw_only=True):
    """Prefill step alone on the device.

    Attributes:
        tokens: of one prompt, computed in the step.
        context: tokens of that prompt before them.
    """

    percentage: int
    tokens: int
    context: int = 0
    ms: float


class DecodePoint(_Part, frozen=True, kw_only=True):
    """Decode step alone on the device.

    Attributes:
        batch: sequences.
        context: tokens of each.
    """

    percentage: int
    batch: int
    context: int
    ms: float


class TogetherPoint(_Part, frozen=True, kw_only=True):
    """Prefill steps and decode steps side by side in two processes, each kind without a pause.

    Attributes:
        priority: prefill runs below decode's priority.
    """

    prefill_percentage: int
    decode_percentage: int
    priority: bool
    tokens: int
    batch: int
    context: int
    prefill_ms: float
    decode_ms: float


class MixedPoint(_Part, frozen=True, kw_only=True):
    """Step of one process with a prompt's chunk and a decode batch in it (mode ``unified``)."""

    chunk: int
    batch: int
    context: int
    ms: float


class StepProfile(_Part, frozen=True, kw_only=True):
    """Measured steps of one model on one device.

    Attributes:
        model: its name; device: in words; source: where the numbers are from.
        format: version of the file format; other versions are refused.
    """

    model: str
    device: str
    source: str
    prefill: tuple[PrefillPoint, ...]
    decode: tuple[DecodePoint, ...]
    together: tuple[TogetherPoint, ...] = ()
    mixed: tuple[MixedPoint, ...] = ()
    format: int = FORMAT

    def save(self, path: Path) -> None:
        """Write the profile as JSON."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    @staticmethod
    def load(path: str | Path) -> StepProfile:
        """Read a file that `save` wrote.

        Raises:
            ConfigError: if the file is missing, or holds no usable profile.
        """
        try:
            profile = msgspec.json.decode(Path(path).read_bytes(), type=StepProfile)
        except OSError as error:
            raise ConfigError(
                f"latency profile {path}: {error.strerror}; `python -m hbserve.profile` makes one"
            ) from None
        except msgspec.DecodeError as error:
            raise ConfigError(f"latency profile {path}: {error}") from None
        profile.check(str(path))
        return profile

    def check(self, where: str) -> None:
        """Check that a model can be fitted to the points; raises `ConfigError` if not."""
        if self.format != FORMAT:
            raise ConfigError(f"latency profile {where}: format {self.format}, expected {FORMAT}; profile again")
        for name, points in (("prefill", self.prefill), ("decode", self.decode)):
            if not points:
                raise ConfigError(f"latency profile {where}: no {name} points")
        percentages = [p.percentage for p in self.prefill] + [p.percentage for p in self.decode]
        percentages += [p for t in self.together for p in (t.prefill_percentage, t.decode_percentage)]
        if not all(1 <= percentage <= 100 for percentage in percentages):
            raise ConfigError(f"latency profile {where}: a percentage is not in 1..100")
        times = [p.ms for p in self.prefill] + [p.ms for p in self.decode] + [p.ms for p in self.mixed]
        times += [ms for t in self.together for ms in (t.prefill_ms, t.decode_ms)]
        if not all(0 < ms < 1e7 for ms in times):
            raise ConfigError(f"latency profile {where}: a time is not a positive number of milliseconds")
