"""``python -m benchmarks verify``: what the checksums of KV transfers cost (``kv_transfer.verify``).

Two systems of a prefill and a decode worker run at the same time on the same devices, one of which verifies. They are
measured in turns, so that what else goes on is the same for both: TTFT and time to the second token of requests that
come alone, and output tokens per second of many at once. Each round compares the two, in the other order than the round
before; the cost is the median over the rounds, with its quartiles.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import numpy as np

from hbserve import DisaggregatedLLM, SamplingParams
from hbserve.bench.arguments import (
    add_engine_arguments,
    check_new_file,
    engine_arguments,
    find_model,
    make_config,
    positive,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", default="qwen3-8b", help="a folder, or a shape under configs/models")
    parser.add_argument("--prompt-lens", type=positive, nargs="+", default=[4096, 16384], metavar="TOKENS")
    parser.add_argument("--rounds", type=positive, default=8)
    parser.add_argument("--num-requests", type=positive, default=32, help="at once, for throughput (default: 32)")
    parser.add_argument("--input-len", type=positive, default=1024, help="of these (default: 1024)")
    parser.add_argument("--output-len", type=positive, default=64, help="of these (default: 64)")
    parser.add_argument("--json", type=Path)
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write the JSON file."""
    check_new_file("--json", arguments.json)
    found = asyncio.run(_measure(arguments))
    for name, (without, with_) in found.items():
        cost = np.array(with_) / np.array(without) - 1
        low, median, high = np.percentile(cost, [25, 50, 75])
        print(
            f"{name:28} {statistics.median(without):9.2f} without, {statistics.median(with_):9.2f} with checksums; "
            f"in a round {median:+.2%} (quartiles {low:+.2%}, {high:+.2%})"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


async def _measure(arguments: argparse.Namespace) -> dict[str, tuple[list[float], list[float]]]:
    model = find_model(arguments.model)
    longest = max(*arguments.prompt_lens, arguments.input_len + arguments.output_len) + 64
    room = max(2 * longest, arguments.num_requests * (arguments.input_len + arguments.output_len + 64))
    defaults = {"block_size": 16, "num_blocks": -(-room // 16), "max_model_len": longest, "host_bytes": 0}
    engine = defaults | engine_arguments(arguments, model) | {"mode": "disaggregated"}
    configs = [make_config(model, engine | {"kv_verify": verify}) for verify in (False, True)]
    samples: dict[str, tuple[list[float], list[float]]] = {}
    random = np.random.default_rng(1)
    async with AsyncExitStack() as stack:
        starts = (stack.enter_async_context(DisaggregatedLLM(config)) for config in configs)
        systems = await asyncio.gather(*starts)
        for number in range(arguments.rounds + 1):  # the first one warms up
            for index in (0, 1) if number % 2 else (1, 0):
                measured = await _round(systems[index], arguments, random)
                for name, value in measured.items() if number else ():
                    samples.setdefault(name, ([], []))[index].append(value)
    return samples


async def _round(llm: DisaggregatedLLM, arguments: argparse.Namespace, random: np.random.Generator) -> dict[str, float]:
    found: dict[str, float] = {}
    vocab_size = llm.engine.vocab_size

    async def ask(length: int, num_tokens: int) -> list[float]:
        prompt: list[int] = random.integers(1, vocab_size, size=length).tolist()
        sampling: Any = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        began, times = time.monotonic(), []
        async with aclosing(llm.stream(prompt, sampling)) as deltas:
            async for delta in deltas:
                times += [1000 * (time.monotonic() - began)] * len(delta.token_ids)
        return times

    for length in arguments.prompt_lens:
        first, second = await ask(length, 2)
        found[f"TTFT of {length}, ms"] = first
        found[f"second token of {length}, ms"] = second
    began = time.monotonic()
    await asyncio.gather(*(ask(arguments.input_len, arguments.output_len) for _ in range(arguments.num_requests)))
    found["output tokens a second"] = arguments.num_requests * arguments.output_len / (time.monotonic() - began)
    return found
