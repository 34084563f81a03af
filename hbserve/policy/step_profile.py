"""Measured step times of one model on one device, as plain data; see `hbserve.policy.profile_file` for their file."""

from __future__ import annotations

import msgspec

from hbserve.errors import ConfigError

FORMAT = 2
"""Version of the file format."""


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class StepPoint(_Part, frozen=True, kw_only=True):
    """Step of one process, alone on the device: with a prompt chunk, a decode batch, or both.

    Attributes:
        prompt_tokens: of one prompt.
        prompt_context: tokens of that prompt before them.
        decode_rows: sequences that decode.
        decode_context: tokens of each of them.
    """

    percentage: int
    prompt_tokens: int = 0
    prompt_context: int = 0
    decode_rows: int = 0
    decode_context: int = 0
    ms: float


class PairPoint(_Part, frozen=True, kw_only=True):
    """Prefill steps and decode steps side by side in two processes, each kind without a pause.

    Attributes:
        priority: prefill runs below decode's priority.
        prompt_tokens, decode_rows, decode_context: as in `StepPoint`.
    """

    prefill_percentage: int
    decode_percentage: int
    priority: bool
    prompt_tokens: int
    decode_rows: int
    decode_context: int
    prefill_ms: float
    decode_ms: float


class StepProfile(_Part, frozen=True, kw_only=True):
    """Measured steps of one model on one device.

    Attributes:
        format: version of the file format.
        model: its name; device: in words; source: where the numbers are from.
        subject: what the times are of, as `hbserve.policy.profile_store.ProfileKey` says it; empty in older files.
    """

    format: int
    model: str
    device: str
    source: str
    subject: str = ""
    steps: tuple[StepPoint, ...]
    pairs: tuple[PairPoint, ...] = ()

    @property
    def prefill(self) -> list[StepPoint]:
        """Steps with a prompt alone."""
        return [point for point in self.steps if not point.decode_rows]

    @property
    def decode(self) -> list[StepPoint]:
        """Steps with a decode batch alone."""
        return [point for point in self.steps if not point.prompt_tokens]

    @property
    def mixed(self) -> list[StepPoint]:
        """Steps with both."""
        return [point for point in self.steps if point.prompt_tokens and point.decode_rows]

    def check(self, where: str) -> None:
        """Check that curves can be fitted to the points; raises `ConfigError` if not."""
        if any(not p.prompt_tokens and not p.decode_rows for p in self.steps):
            raise ConfigError(f"latency profile {where}: a step has neither prompt_tokens nor decode_rows")
        for name, points in (("prompts", self.prefill), ("decode_rows", self.decode)):
            if not points:
                raise ConfigError(f"latency profile {where}: no steps with {name} alone")
        if any(min(p.prompt_tokens, p.prompt_context, p.decode_rows) < 0 for p in self.steps):
            raise ConfigError(f"latency profile {where}: a number of tokens or sequences is negative")
        if any(p.decode_context < 1 for p in self.steps if p.decode_rows):
            raise ConfigError(f"latency profile {where}: a decode_context is below 1")
        percentages = [p.percentage for p in self.steps]
        percentages += [p for pair in self.pairs for p in (pair.prefill_percentage, pair.decode_percentage)]
        if not all(1 <= percentage <= 100 for percentage in percentages):
            raise ConfigError(f"latency profile {where}: a percentage is not in 1..100")
        times = [p.ms for p in self.steps] + [ms for pair in self.pairs for ms in (pair.prefill_ms, pair.decode_ms)]
        if not all(0 < ms < 1e7 for ms in times):
            raise ConfigError(f"latency profile {where}: a time is not a positive number of milliseconds")
