"""Quick start: one prefill and one decode instance behind plain function calls.

python examples/quick_start_sync.py [model folder]
"""

import sys
from pathlib import Path

from hbserve.pd_disagg import LLM
from hbserve.sampling_params import SamplingParams

DEMO_MODEL = Path(__file__).resolve().parent / "models" / "hbserve-demo"

llm = LLM(
    sys.argv[1] if len(sys.argv) > 1 else str(DEMO_MODEL), kv_transfer_backend="nccl", chunked_prefill_enabled=True
)

sampling_params = SamplingParams(temperature=0.6, max_tokens=256, seed=0)

# A plain prompt, with the turns of a chat in the format of Qwen and the demo model ...
prompts = ["<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"]
outputs = llm.generate(prompts, sampling_params)
print(outputs[0]["text"])

# ... and a conversation, which the model's own template turns into a prompt.
outputs = llm.chat([{"role": "user", "content": "What is HBServe?"}], sampling_params)
print(outputs[0]["text"])
