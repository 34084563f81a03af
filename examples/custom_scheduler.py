"""A scheduling policy of your own: shortest prompt first, with ageing.

    python examples/custom_scheduler.py [model folder]

Short prompts overtake long ones, which lowers the mean time to the first token; ageing keeps the
long ones from waiting for ever.
"""

import asyncio
import sys
from contextlib import aclosing
from pathlib import Path

from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve.pd_disagg.cpu_scheduler import CpuScheduler
from hbserve.sampling_params import SamplingParams

DEMO_MODEL = Path(__file__).resolve().parent / "models" / "hbserve-demo"
TOKENS_PER_SECOND = 100
"""Tokens that a waiting prompt seems shorter with every second."""


class ShortestPromptFirst(CpuScheduler):
    """Order the queue by prompt length, minus a bonus for waiting."""

    async def _schedule_waiting_requests(self) -> None:
        # All prompts age alike, so the time of arrival can stand for the age.
        self.waiting.sort(key=lambda sequence: len(sequence.tokens) + TOKENS_PER_SECOND * sequence.arrival_time)
        await super()._schedule_waiting_requests()


KEYS = ["dog", "eagle", "chalk", "flute", "candle", "bridge", "cactus", "donkey", "falcon", "garlic", "harp", "jar"]
VALUES = ["parrot", "maple", "oasis", "ring", "piano", "pencil", "ocean", "pebble", "quartz", "river", "rose", "sail"]


def question(num_pairs: int) -> str:
    """Return a prompt of about three tokens per pair."""
    pairs = ", ".join(f"{key} {value}" for key, value in zip(KEYS[:num_pairs], VALUES, strict=False))
    return f"Remember: {pairs}. What is {KEYS[0]}?"


async def main() -> None:
    config = PdDisaggConfig(
        model_path=sys.argv[1] if len(sys.argv) > 1 else str(DEMO_MODEL),
        mode="unified",
        max_num_seqs=1,
        scheduler="custom_scheduler:ShortestPromptFirst",
        log_level="WARNING",
    )
    async with DisaggregatedLLM(config) as llm:

        async def ask(num_pairs: int) -> None:
            messages = [{"role": "user", "content": question(num_pairs)}]
            answer = await llm.chat(messages, SamplingParams(temperature=0, max_tokens=32))
            print(f"{answer['num_prompt_tokens']} tokens: {answer['text']}", flush=True)

        # An endless request takes the only slot until all questions have arrived.
        async with aclosing(llm.stream("a", SamplingParams(max_tokens=None, ignore_eos=True))) as endless:
            await anext(endless)
            tasks = [asyncio.create_task(ask(num_pairs)) for num_pairs in (12, 1, 8, 4)]
            while True:
                await asyncio.sleep(0.01)
                if llm.get_system_stats()["cpu_scheduler"]["total_requests"] == 1 + len(tasks):
                    break
        await asyncio.gather(*tasks)


# The scheduler's process imports the class from this file; only the program itself must start a system.
if __name__ == "__main__":
    asyncio.run(main())
