"""Draw what the GPU does during ten decode steps of one worker.

    python scripts/profile_decode.py --model qwen3-0.6b --batch-size 256 --context 600 --out decode.png

Plans go in as the scheduler sends them, three in flight; weights are random. Needs a GPU and matplotlib.
"""

from __future__ import annotations

import argparse
import logging
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from hbserve.config import from_dict
from hbserve.engine.model_runner import ModelRunner
from hbserve.messages.worker import PlanRow, SequenceState, StepPlan
from hbserve.model_source import SHAPES
from hbserve.platform import make_platform
from hbserve.sampling_params import SamplingParams

NUM_STEPS = 10
NUM_IN_FLIGHT = 3
WARM_UP_STEPS = 20
KINDS = {
    "attention": ("_decode_kernel",),
    "matrix products": ("nvjet", "gemm", "cublas", "_one_row"),
    "norms, rotation, gate": ("_add_rms_norm", "_norm_rotate_store", "_silu_and_mul"),
    "sampling": ("_best_of",),
    "copies": ("Memcpy", "Memset"),
}
OTHER = "other"


@dataclass(frozen=True)
class Span:
    """Kernel or copy: its class, start and end in microseconds."""

    kind: str
    start_us: float
    duration_us: float


def kind_of(name: str) -> str:
    """Return the class of a kernel by its name."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHER)


def make_runner(model: str, batch_size: int, context: int) -> ModelRunner:
    """Make a worker of a model with random weights, large enough for the batch."""
    config = from_dict(
        {
            "mode": "unified",
            "model": {
                "path": str(SHAPES / model),
                "load_format": "dummy",
                "dtype": "bfloat16",
                "max_model_len": 2 * context + 256,
            },
            "performance": {"max_num_seqs": batch_size},
        }
    )
    platform = make_platform("cuda", 0, None, 1)
    platform.activate()
    return ModelRunner(config, config.gpu_instances[0], platform)


class Plans:
    """Decode plans of a batch that never changes."""

    def __init__(self, runner: ModelRunner, batch_size: int, context: int) -> None:
        self._batch_size, self._position, self._num_steps = batch_size, context, 0
        per_sequence = -(-(context + 128) // runner.layout.block_size)
        self._sequences = [
            SequenceState(
                slot=slot,
                block_ids=list(range(slot * per_sequence, (slot + 1) * per_sequence)),
                sampling=SamplingParams(temperature=0.6, seed=slot, max_tokens=128),
                end_token_ids=[],
                min_end_position=0,
                num_prompt_tokens=context,
            )
            for slot in range(batch_size)
        ]

    def next(self) -> StepPlan:
        """Make the next plan: the first brings the sequences, the others feed back the sampled tokens."""
        first = self._num_steps == 0
        self._num_steps += 1
        rows = [
            PlanRow(
                slot=slot,
                start=self._position,
                num_tokens=1,
                token_ids=[5] if first else None,
                new_block_ids=[],
                sample=True,
            )
            for slot in range(self._batch_size)
        ]
        self._position += 1
        sequences = self._sequences if first else []
        return StepPlan(epoch=1, step_id=self._num_steps, rows=rows, new_sequences=sequences, sends=[])


def run_steps(runner: ModelRunner, plans: Plans, count: int) -> None:
    """Launch ``count`` steps and wait for them."""
    pending: deque[Any] = deque()
    for _ in range(count):
        if len(pending) == NUM_IN_FLIGHT:
            pending.popleft().result()
        pending.append(runner.launch(plans.next()))
    for step in pending:
        step.result()


def record(runner: ModelRunner, plans: Plans) -> list[Span]:
    """Record the kernels and copies of ten steps, in order."""
    run_steps(runner, plans, WARM_UP_STEPS)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run_steps(runner, plans, NUM_STEPS)
        torch.cuda.synchronize()
    events = [event for event in recorded.events() if event.device_type.name == "CUDA"]
    spans = [Span(kind_of(event.name), event.time_range.start, event.time_range.elapsed_us()) for event in events]
    return sorted(spans, key=lambda span: span.start_us)


def draw(spans: list[Span], title: str, out: Path) -> None:
    """Draw all ten steps above, and one step below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip([*KINDS, OTHER], plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    origin = spans[0].start_us
    end = max(span.start_us + span.duration_us for span in spans) - origin
    step = end / NUM_STEPS
    figure, axes = plt.subplots(2, 1, figsize=(14, 4.5), constrained_layout=True)
    for axis, (begin, finish) in zip(axes, ((0.0, end), (4 * step, 5 * step)), strict=True):
        for kind, colour in colours.items():
            bars = [
                ((span.start_us - origin) / 1e3, span.duration_us / 1e3)
                for span in spans
                if span.kind == kind and begin <= span.start_us - origin < finish
            ]
            share = sum(span.duration_us for span in spans if span.kind == kind) / end
            axis.broken_barh(bars, (0, 1), facecolors=colour, label=f"{kind} {share:.0%}")
        axis.set_xlim(begin / 1e3, finish / 1e3)
        axis.set_yticks([])
        axis.set_xlabel("ms")
    axes[0].set_title(title)
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=6, fontsize=8, frameon=False)
    figure.savefig(out, dpi=110)


def busy_us(spans: list[Span]) -> float:
    """Return the time in which at least one kernel ran; kernels may overlap."""
    total, covered = 0.0, spans[0].start_us
    for span in spans:
        end = span.start_us + span.duration_us
        total += max(0.0, end - max(covered, span.start_us))
        covered = max(covered, end)
    return total


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-0.6b", help="a shape under configs/models")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--context", type=int, default=600, help="tokens of each sequence")
    parser.add_argument("--out", type=Path, default=Path("decode.png"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    runner = make_runner(options.model, options.batch_size, options.context)
    spans = record(runner, Plans(runner, options.batch_size, options.context))
    span_us = max(span.start_us + span.duration_us for span in spans) - spans[0].start_us
    idle = 1 - busy_us(spans) / span_us
    title = (
        f"{options.model}, {options.batch_size} sequences of {options.context} tokens: "
        f"{span_us / NUM_STEPS / 1e3:.2f} ms a step, device idle {idle:.1%}"
    )
    print(title)
    for kind in [*KINDS, OTHER]:
        own = sum(span.duration_us for span in spans if span.kind == kind)
        print(f"  {kind:24} {own / NUM_STEPS / 1e3:8.3f} ms a step")
    draw(spans, title, options.out)


if __name__ == "__main__":
    main()
