"""``python -m benchmarks transfer``: how fast KV moves between two processes of this host.

Beside the rate of two of our ranks (`benchmarks.two_ranks`) stands the rate of the library under the
backend (`benchmarks.raw_links`). It is measured in the same run between the same two processes: as many bytes
for each transfer, in one piece, one after the other, without our code around it. With ``--model`` the
command measures whole systems instead (`benchmarks.handover`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import handover
from benchmarks.two_ranks import TransferOptions, two_ranks
from hbserve.bench.arguments import check_new_file
from hbserve.errors import ConfigError

_BACKENDS = ("nccl", "shm", "mooncake")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; see `options_from`."""
    parser.add_argument(
        "--backend",
        default="nccl",
        help="nccl (default; gloo on the CPU), shm or mooncake; with --model several, comma-separated",
    )
    parser.add_argument("--protocol", choices=["tcp", "rdma", "nvlink"], help="how Mooncake moves bytes")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="cuda: from GPU 0 to GPU 1")
    parser.add_argument(
        "--block-bytes", type=int, default=147456 * 16, help="of a KV block (default: 16 tokens of Qwen3-8B)"
    )
    parser.add_argument(
        "--transfer-blocks",
        default="1,8,32,128",
        help="blocks of one transfer, one line each (default: 1,8,32,128; 32 are a prompt chunk of 512 tokens)",
    )
    parser.add_argument("--total-mib", type=int, default=1024, help="MiB that each run moves (default: 1024)")
    parser.add_argument("--scatter", action="store_true", help="no two blocks of a transfer are neighbours")
    parser.add_argument("--repeats", type=int, default=3, help="runs for each line (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    handover.add_arguments(parser)


def options_from(arguments: argparse.Namespace) -> TransferOptions:
    """Read what `add_arguments` has declared.

    Raises:
        ConfigError: naming the argument that cannot be honoured.
    """
    sizes = arguments.transfer_blocks.split(",")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise ConfigError(f"--transfer-blocks: {arguments.transfer_blocks!r} is not a list of positive numbers")
    if arguments.backend not in _BACKENDS:
        raise ConfigError(f"--backend: {arguments.backend!r} is none of {', '.join(_BACKENDS)}")
    check_new_file("--json", arguments.json)
    for name in ("block_bytes", "total_mib", "repeats"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: must be positive")
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.device_count() > 1 else "cpu"
    return TransferOptions(
        backend=arguments.backend,
        protocol=arguments.protocol,
        device=device,
        block_bytes=arguments.block_bytes,
        transfer_blocks=tuple(int(size) for size in sizes),
        total_bytes=arguments.total_mib << 20,
        scatter=arguments.scatter,
        repeats=arguments.repeats,
        json=arguments.json,
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure, print a table and write the JSON file.

    Raises:
        HBServeError: if the backend cannot be used here.
    """
    if arguments.model is not None:
        handover.run(handover.options_from(arguments))
        return
    options = options_from(arguments)
    if options.device == "cuda" and torch.cuda.device_count() < 2:
        raise ConfigError("--device cuda: needs two GPUs")
    lines = asyncio.run(_measure(options))
    if options.json is not None:
        document = {"benchmark": "transfer", "options": asdict(options) | {"json": None}, "lines": lines}
        options.json.write_text(json.dumps(document, indent=2) + "\n")


async def _measure(options: TransferOptions) -> list[dict[str, Any]]:
    lines = []
    async with two_ranks(options) as link:
        how = "scattered" if options.scatter else "neighbouring"
        print(f"{options.backend} on {options.device}, blocks of {options.block_bytes} bytes, {how}")
        print(f"{'transfer':>12} {'one':>10} {'stream':>12} {'library':>12} {'share':>7}")
        for num_blocks in options.transfer_blocks:
            count = max(1, options.total_bytes // (num_blocks * options.block_bytes))
            await link.move(num_blocks, min(count, 8))  # connects, and touches the memory
            one_s = statistics.median([await link.move(num_blocks, 1) for _ in range(max(3, options.repeats))])
            stream_s = statistics.median([await link.move(num_blocks, count) for _ in range(options.repeats)])
            num_bytes = num_blocks * options.block_bytes
            raw_s = statistics.median([await link.move_raw(num_bytes, count) for _ in range(options.repeats)])
            line = {
                "transfer_bytes": num_bytes,
                "count": count,
                "one_transfer_s": one_s,
                "gb_per_s": num_bytes * count / stream_s / 1e9,
                "library_gb_per_s": num_bytes * count / raw_s / 1e9,
            }
            lines.append(line)
            print(
                f"{num_bytes / (1 << 20):8.2f} MiB {one_s * 1e3:7.2f} ms {line['gb_per_s']:7.2f} GB/s "
                f"{line['library_gb_per_s']:7.2f} GB/s {raw_s / stream_s:7.0%}",
                flush=True,
            )
    return lines
