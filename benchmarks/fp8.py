"""FP8 beside bfloat16 in kernels on one GPU: products and decode attention.

It prints GB/s of weights and TFLOP/s of each matrix of an 8B model by the number of rows, and the bandwidth of decode
attention. Weights are random; `--json` keeps the numbers. `benchmarks.fp8_engine` has whole engines.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

_SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
"""Outputs and inputs of Qwen3-8B's matrices."""

_ROWS = (1, 4, 16, 32, 64, 128, 512, 4096)
_COLD_BYTES = 200 << 20
"""Bytes of the copies of a matrix that calls go through in turn: four times the L2 cache of an H200."""


def _microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Return the time of one call, from replays of a CUDA graph of all of them."""
    for _ in range(2):
        for call in calls:
            call()
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    best = float("inf")
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e3 / len(calls))
    return best


def _layers(num_outputs: int, size: int, kind: str) -> list[Any]:
    from hbserve.float8 import FP8
    from hbserve.layers.fp8 import Fp8Linear
    from hbserve.layers.linear import PlainLinear

    copies = max(2, _COLD_BYTES // (num_outputs * size * (2 if kind == "bf16" else 1)))
    weights = [torch.randn(num_outputs, size, device="cuda") for _ in range(copies)]
    if kind == "bf16":
        return [PlainLinear(weight.to(torch.bfloat16)) for weight in weights]
    shape = (num_outputs // 128, size // 128) if kind == "block" else (num_outputs,)
    scale = torch.ones(shape, device="cuda")
    return [Fp8Linear(weight.to(FP8), scale, None, None, torch.bfloat16) for weight in weights]


def _kernels() -> dict[str, Any]:
    from hbserve.layers.fp8_kernels import Fp8Kernels
    from hbserve.layers.fused_ops import PlainKernels

    found: dict[str, Any] = {}
    print(f"{'matrix':8} {'rows':>5} {'':>8} {'us':>8} {'GB/s':>7} {'TFLOP/s':>8} {'of bf16':>8}")
    for name, (num_outputs, size) in _SHAPES.items():
        for num_rows in _ROWS:
            x = torch.randn(num_rows, size, device="cuda").to(torch.bfloat16)
            plain_us = 0.0
            for kind in ("bf16", "channel", "block") if num_rows in (1, 16, 4096) else ("bf16", "channel"):
                layers, kernels = _layers(num_outputs, size, kind), PlainKernels() if kind == "bf16" else Fp8Kernels()
                fused: Any = kernels.rows_kernel(layers[0], num_rows)
                call: Any = fused or kernels.many_rows
                rows: Any = x
                if fused is None and kind != "bf16":
                    from hbserve.layers.fp8_rows import fp8_rows

                    rows = fp8_rows(layers[0], x)  # the kernel before quantises
                calls = [partial(call, layer, rows) for layer in layers]
                micros = _microseconds(calls)
                plain_us = plain_us or micros
                gb_s = num_outputs * size * (2 if kind == "bf16" else 1) / micros / 1e3
                tflop_s = 2 * num_rows * num_outputs * size / micros / 1e6
                found[f"{name} {num_rows} {kind}"] = {"us": micros, "gb_s": gb_s, "tflop_s": tflop_s}
                ratio = plain_us / micros
                print(
                    f"{name:8} {num_rows:5} {kind:>8} {micros:8.1f} {gb_s:7.0f} {tflop_s:8.1f} {ratio:8.2f}", flush=True
                )
                del layers, calls
    return found | _decode_attention(32, 16384)


def _decode_attention(num_rows: int, context: int) -> dict[str, Any]:
    """Decode attention of one layer of Qwen3-8B."""
    import numpy as np

    from hbserve.attention.paged_decode import DecodeInputs, PagedDecode
    from hbserve.float8 import FP8
    from hbserve.kv_cache.layout import KVLayout

    found: dict[str, Any] = {}
    for dtype in (torch.bfloat16, FP8):
        layout = KVLayout(1, 16, 8, 128, dtype)
        num_pages = num_rows * context // 16
        cache = torch.zeros(num_pages * layout.block_bytes, dtype=torch.uint8, device="cuda")
        decode = PagedDecode(layout, layout.view(cache, num_pages), 32, num_rows)
        lens = np.full(num_rows, context, np.int32)
        cut = decode.cut(lens)
        positions = torch.from_numpy(lens.astype(np.int64) - 1).cuda()
        decode.begin(
            DecodeInputs(
                pieces=torch.from_numpy(cut.pieces).cuda(),
                first_piece=torch.from_numpy(cut.first_piece).cuda(),
                first_row=torch.arange(num_rows + 1, dtype=torch.int32, device="cuda"),
                indptr=torch.arange(0, num_pages + 1, context // 16, dtype=torch.int32, device="cuda"),
                indices=torch.randperm(num_pages, device="cuda").to(torch.int32),
                positions=positions,
                num_stored=positions,
                slot_mapping=torch.zeros(num_rows, dtype=torch.int64, device="cuda"),
                chunk_len=torch.tensor([cut.chunk_len], dtype=torch.int32, device="cuda"),
            )
        )
        q = torch.randn(num_rows, 32, 128, device="cuda").to(torch.bfloat16)
        out = torch.empty_like(q)
        micros = _microseconds([partial(decode.attend, 0, q, out)] * 8)
        gb_s = len(cache) / micros / 1e3
        name = "bf16" if dtype == torch.bfloat16 else "fp8"
        found[f"attention {num_rows} x {context} {name}"] = {"us": micros, "gb_s": gb_s}
        print(f"attention {num_rows} x {context} {name:>5} {micros:8.1f} us {gb_s:7.0f} GB/s", flush=True)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this experiment."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write the JSON file."""
    found = _kernels()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
