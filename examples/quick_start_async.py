"""Quick start: one prefill and one decode instance, used from asyncio.

python examples/quick_start_async.py [model folder]
"""

import asyncio
import sys
from pathlib import Path

from hbserve.pd_disagg import DisaggregatedLLM, KVTransferBackend, PdDisaggConfig
from hbserve.sampling_params import SamplingParams

DEMO_MODEL = Path(__file__).resolve().parent / "models" / "hbserve-demo"

config = PdDisaggConfig(
    model_path=sys.argv[1] if len(sys.argv) > 1 else str(DEMO_MODEL),
    kv_transfer_backend=KVTransferBackend.NCCL,
    chunked_prefill_enabled=True,
    cuda_graph_enabled=True,
)
# generate() takes plain prompts, so this program writes the turns of a chat itself, in the format of Qwen
# and the demo model. chat() applies the model's own template.
CHAT_TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


async def main() -> None:
    llm = DisaggregatedLLM(config)
    try:
        await llm.start()

        prompts = [CHAT_TURN.format("What is prefill?"), CHAT_TURN.format("What is decode?")]
        sampling_params = SamplingParams(temperature=0.7, max_tokens=100, seed=0)
        results = await llm.generate(prompts, sampling_params)
        for prompt, result in zip(prompts, results, strict=True):
            print(f"Prompt: {prompt}")
            print(f"Response: {result['text']}")
    finally:
        await llm.stop()


asyncio.run(main())
