"""Where the time of a prefill goes: kernels by kind, gaps between them, and products beside the card's own rate.

`python -m benchmarks prefill` runs prompts of a model with random weights in this process, as a worker does, and
records one step. The card's rate is that of the same products alone: in a short burst, and for as long as a prefill
takes under load, when the card lowers its clock to stay within its power. Both are recorded.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.device_clock import DeviceClock
from hbserve.bench.arguments import find_model

if TYPE_CHECKING:
    from hbserve.engine.model_runner import ModelRunner
    from hbserve.models.decoder import Decoder

_KINDS = {
    "attention": ("_prefill_kernel", "Prefill", "flash_fwd"),
    "products": ("nvjet", "gemm", "cublas", "cutlass", "_linear_kernel", "splitK"),
    "norms": ("norm_kernel",),
    "rotation, KV": ("_norm_rotate_store", "_widen_pages"),
    "gate": ("_silu_and_mul", "_rows_kernel"),
}
"""Parts of kernels' names; the first kind that fits counts."""

_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "bf16": {},
    "fp8": {"model": {"quantization": "fp8"}, "kv_cache": {"dtype": "fp8"}},
    "fp8-weights": {"model": {"quantization": "fp8"}},
}
_BURST_S, _SUSTAINED_S = 0.02, 0.8
_PAUSE_S = 1.0  # in which the card cools down before the burst


def _make_runner(model: Path, kind: str, prompts: int, length: int) -> ModelRunner:
    from hbserve.config import from_dict
    from hbserve.engine.model_runner import ModelRunner
    from hbserve.platform import make_platform

    options = _OPTIONS[kind]
    shape = {"path": str(model), "load_format": "dummy", "max_model_len": length + 16}
    config = from_dict(
        {
            "mode": "unified",
            "model": shape | options.get("model", {}),
            "kv_cache": options.get("kv_cache", {}),
            "performance": {"max_num_seqs": prompts, "max_num_batched_tokens": prompts * length},
            "cuda_graph": {"enabled": False},  # as in service, where steps of so many tokens have none
        }
    )
    platform = make_platform("cuda", 0, None, 1)
    platform.activate()
    return ModelRunner(config, config.gpu_instances[0], platform)


def _step(runner: ModelRunner, prompts: int, length: int) -> float:
    """Run a step of whole prompts; return its seconds."""
    from hbserve.messages.worker import PlanRow, SequenceState, StepPlan
    from hbserve.sampling_params import SamplingParams

    blocks = -(-length // runner.layout.block_size)
    sampling = SamplingParams(temperature=0, max_tokens=1)
    states = [
        SequenceState(
            slot=slot,
            block_ids=list(range(slot * blocks, (slot + 1) * blocks)),
            sampling=sampling,
            end_token_ids=[],
            min_end_position=0,
            num_prompt_tokens=length,
        )
        for slot in range(prompts)
    ]
    tokens = [1 + index % 9000 for index in range(length)]
    rows = [
        PlanRow(slot=slot, start=0, num_tokens=length, token_ids=tokens, new_block_ids=[], sample=True)
        for slot in range(prompts)
    ]
    began = time.perf_counter()
    runner.launch(StepPlan(epoch=1, step_id=1, rows=rows, new_sequences=states, sends=[])).result()
    return time.perf_counter() - began


def _record(runner: ModelRunner, prompts: int, length: int) -> tuple[dict[str, float], float, float]:
    """Return milliseconds by kind of kernel, those in which any kernel ran, and those from first to last kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        _step(runner, prompts, length)
        torch.cuda.synchronize()
    events = [event for event in recorded.events() if event.device_type.name == "CUDA"]
    events.sort(key=lambda event: event.time_range.start)
    by_kind: Counter[str] = Counter()
    others: Counter[str] = Counter()
    busy, covered = 0.0, events[0].time_range.start
    for event in events:
        begin, end = event.time_range.start, event.time_range.end
        kind = next((kind for kind, parts in _KINDS.items() if any(part in event.name for part in parts)), "other")
        by_kind[kind] += (end - begin) / 1e3
        if kind == "other":
            others[event.name[:60]] += (end - begin) / 1e3
        busy += max(0.0, end - max(covered, begin))
        covered = max(covered, end)
    for name, ms in others.most_common(4):
        print(f"    other: {name} {ms:.2f} ms")
    return dict(by_kind), busy / 1e3, (covered - events[0].time_range.start) / 1e3


def _product_rate(decoder: Decoder, num_rows: int, seconds: float) -> float:
    """Measure TFLOP/s of a layer's products alone, one after the other, for some seconds."""
    layer = decoder.layers[0]
    ops = decoder._ops
    assert isinstance(layer.mlp, tuple), "the model is dense"
    calls: list[tuple[Any, Any]] = []
    for linear in (layer.qkv, layer.o, *layer.mlp):
        num_inputs = linear.num_weights // linear.num_outputs
        x = torch.randn(num_rows, num_inputs, device="cuda").to(torch.bfloat16)
        rows: Any = x
        if hasattr(linear, "scale"):
            from hbserve.layers.fp8_rows import fp8_rows

            rows = fp8_rows(linear, x)  # type: ignore[arg-type]
        calls.append((linear, rows))
    weights = decoder.token_parameters(0)

    def run_layer() -> None:
        for linear, rows in calls:
            ops.linear(rows, linear)

    run_layer()
    torch.cuda.synchronize()
    began, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < seconds:
        for _ in range(4):
            run_layer()
        torch.cuda.synchronize()
        count += 4
    return 2 * num_rows * weights * count / elapsed / 1e12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this experiment."""
    parser.add_argument("--model", default="qwen3-8b", help="a model folder, or a shape under configs/models")
    parser.add_argument("--kinds", nargs="+", default=["bf16", "fp8"], choices=list(_OPTIONS))
    parser.add_argument("--prompts", type=int, default=4, help="prompts of a step (default: 4)")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a prompt (default: 4096)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")


def run(arguments: argparse.Namespace) -> None:
    """Measure one kind of weights after the other."""
    found: dict[str, Any] = {}
    prompts, length = arguments.prompts, arguments.length
    tokens = prompts * length
    clock = DeviceClock(str(torch.cuda.get_device_properties(0).uuid))
    for kind in arguments.kinds:
        runner = _make_runner(find_model(arguments.model), kind, prompts, length)
        for _ in range(2):
            _step(runner, prompts, length)
        with clock.record() as in_steps:
            steps = [_step(runner, prompts, length) for _ in range(8)]
        best, mean = min(steps), sum(steps) / len(steps)
        by_kind, busy_ms, span_ms = _record(runner, prompts, length)
        decoder = runner._decoder
        flops = 2 * tokens * sum(decoder.token_parameters(i) for i in range(len(decoder.layers)))
        time.sleep(_PAUSE_S)
        burst = _product_rate(decoder, 4096, _BURST_S)
        with clock.record() as in_products:
            sustained = _product_rate(decoder, 4096, _SUSTAINED_S)
        own = flops / by_kind["products"] / 1e9
        found[kind] = {
            "best_tok_s": tokens / best,
            "mean_tok_s": tokens / mean,
            "ms": by_kind,
            "busy_ms": busy_ms,
            "span_ms": span_ms,
            "products_tflop_s": own,
            "burst_tflop_s": burst,
            "sustained_tflop_s": sustained,
            "all_tflop_s": flops / best / 1e12,
            "clock": {"steps": in_steps, "products alone": in_products},
        }
        print(
            f"{kind}: best {tokens / best:.0f} tok/s, mean of 8 {tokens / mean:.0f}; idle {1 - busy_ms / span_ms:.1%}"
        )
        for name, ms in sorted(by_kind.items(), key=lambda item: -item[1]):
            print(f"  {name:14} {ms:8.2f} ms  {ms / span_ms:6.1%}")
        print(
            f"  products {own:.0f} TFLOP/s; alone {burst:.0f} in a burst, {sustained:.0f} sustained; "
            f"whole step {flops / best / 1e12:.0f}"
        )
        print(f"  clock and power in steps: {in_steps}\n  in products alone: {in_products}", flush=True)
        del runner, decoder
        torch.cuda.empty_cache()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
