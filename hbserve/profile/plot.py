"""A profile as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hbserve.bench import plots
from hbserve.slo.step_profile import StepProfile


def plot(profile: StepProfile, path: Path) -> None:
    """Draw step times over percentages, and the splits side by side.

    Args:
        path: of the picture; its ending says which kind.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    plots.require_matplotlib("--plot")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    _lines(axes[0], "prefill alone", [(f"{p.tokens} after {p.context}", p.percentage, p.ms) for p in profile.prefill])
    _lines(axes[1], "decode alone", [(f"{p.batch} of {p.context}", p.percentage, p.ms) for p in profile.decode])
    most = max((point.tokens for point in profile.together), default=0)
    for batch in sorted({point.batch for point in profile.together}):
        points = [each for each in profile.together if each.batch == batch and each.tokens == most]
        axes[2].scatter([p.prefill_ms for p in points], [p.decode_ms for p in points], label=f"batch {batch}")
        for p in points:
            axes[2].annotate(f"{p.prefill_percentage},{p.decode_percentage}", (p.prefill_ms, p.decode_ms), fontsize=7)
    axes[2].set(title="side by side (prefill %, decode %)", xlabel="prefill step, ms", ylabel="decode step, ms")
    if profile.together:
        axes[2].legend()
    figure.suptitle(f"{profile.model} on {profile.device}")
    figure.savefig(path)
    pyplot.close(figure)


def _lines(axes: Any, title: str, points: list[tuple[str, int, float]]) -> None:
    for name in dict.fromkeys(label for label, _, _ in points):
        line = sorted((percentage, ms) for label, percentage, ms in points if label == name)
        axes.plot([percentage for percentage, _ in line], [ms for _, ms in line], marker="o", label=name)
    axes.set(title=title, xlabel="percentage", ylabel="ms per step", yscale="log")
    axes.legend(fontsize=7)
