"""Pictures of a serving benchmark, drawn from its results file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hbserve.errors import ConfigError


def require_matplotlib(option: str, path: Path | None = None) -> None:
    """Refuse pictures that cannot be drawn, before anything is measured.

    Args:
        option: the option that asks for pictures.
        path: file of a single picture; its suffix selects the format.

    Raises:
        ConfigError: if matplotlib is not installed, or does not know the format.
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
            raise ConfigError(f"{option}: {path.name!r} has no known suffix; these are known: {', '.join(kinds)}")


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """Draw attainment over rate, the latencies, and the split over time, where the runs have them.

    Args:
        document: as ``--json`` writes it.
        folder: made if it does not exist.

    Returns:
        The files.
    """
    folder.mkdir(exist_ok=True)
    runs = sorted(document["runs"], key=lambda run: run["summary"]["offered_per_s"])
    paths = []
    if len(runs) > 1 and document["targets"] is not None:
        paths.append(_attainment(runs, document, folder / "attainment.png"))
    paths.append(_distributions(runs, document, folder / "latencies.png"))
    if any(run["split"] for run in runs):
        paths.append(_split(runs, folder / "split.png"))
    return paths


def _figure(columns: int) -> tuple[Any, list[Any]]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(6 * columns, 4), squeeze=False, layout="constrained")
    return figure, list(axes[0])


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _attainment(runs: list[dict[str, Any]], document: dict[str, Any], path: Path) -> Path:
    figure, [axis] = _figure(1)
    rates = [run["summary"]["offered_per_s"] for run in runs]
    axis.plot(rates, [100 * run["summary"]["attainment"] for run in runs], "o-")
    if document["best_rate"] is not None:
        axis.axvline(document["best_rate"]["rate"], linestyle=":", color="grey")
    axis.axhline(90, linestyle=":", color="grey")
    targets = document["targets"]
    named = [f"{name.removesuffix('_ms').upper()} ≤ {ms:.0f} ms" for name, ms in targets.items() if ms is not None]
    axis.set(xlabel="requests/s", ylabel="% of requests within targets", ylim=(0, 102), title=", ".join(named))
    return _save(figure, path)


def _distributions(runs: list[dict[str, Any]], document: dict[str, Any], path: Path) -> Path:
    figure, [left, right] = _figure(2)
    for run in runs:
        label = f"{run['summary']['offered_per_s']:.2f}/s"
        ttfts = sorted(request["ttft_ms"] for request in run["requests"] if request["ttft_ms"] is not None)
        for axis, values in ((left, ttfts), (right, run["itl_quantiles_ms"])):
            if values:
                axis.plot(values, [100 * (rank + 1) / len(values) for rank in range(len(values))], label=label)
    for axis, name, target in ((left, "TTFT", "ttft_ms"), (right, "ITL", "tpot_ms")):
        axis.set(xlabel=f"{name}, ms", ylabel="% of samples at most", xscale="log", ylim=(0, 101))
        if document["targets"] is not None and document["targets"][target] is not None:
            axis.axvline(document["targets"][target], linestyle=":", color="grey")
        axis.legend(fontsize="small")
    return _save(figure, path)


def _split(runs: list[dict[str, Any]], path: Path) -> Path:
    runs = [run for run in runs if run["split"]]
    figure, axes = _figure(len(runs))
    for axis, run in zip(axes, runs, strict=True):
        times, prefill, decode, mixed = zip(*run["split"], strict=True)
        axis.step(times, prefill, where="post", label="prefill")
        axis.step(times, decode, where="post", label="decode")
        axis.fill_between(times, 0, 105, where=mixed, step="post", color="0.9", label="mixed")
        axis.set(xlabel="seconds", ylabel="% of the device", ylim=(0, 105))
        axis.set_title(f"{run['summary']['offered_per_s']:.2f} requests/s")
        axis.legend()
    return _save(figure, path)
