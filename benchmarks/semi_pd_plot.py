"""A picture of the streams while a split changes: every gap between two tokens, over time."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path


def draw(
    token_times: dict[int, list[list[float]]], rotation: tuple[float, float, float], title: str, path: Path
) -> None:
    """Draw the gaps around one rotation.

    Args:
        token_times: by stream and request, seconds.
        rotation: time of the request, of the new workers' readiness, and of the old workers' end.
    """
    from matplotlib import pyplot

    asked, ready, settled = rotation
    margin = max(1.0, (settled - asked) / 2)
    points = [
        (later - asked, 1000 * (later - earlier), index == 0)
        for requests in token_times.values()
        for times in requests
        for index, (earlier, later) in enumerate(pairwise(times))
        if asked - margin <= later <= settled + margin
    ]
    figure, axis = pyplot.subplots(figsize=(9, 4), layout="constrained")
    axis.axvspan(0, ready - asked, color="tab:orange", alpha=0.15, label="new workers get ready")
    axis.axvspan(ready - asked, settled - asked, color="tab:red", alpha=0.3, label="plans change over, old workers end")
    for is_first, label, style in ((False, "running stream", ".b"), (True, "first to second token", "+k")):
        chosen = [(at, gap) for at, gap, first in points if first == is_first]
        axis.plot([at for at, _ in chosen], [gap for _, gap in chosen], style, markersize=3, label=label)
    if points:
        axis.set_ylim(0, 1.1 * max(gap for _, gap, _ in points))
    axis.set(xlabel="seconds since the other split was asked for", ylabel="gap between two tokens, ms", title=title)
    axis.legend(loc="upper left")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
