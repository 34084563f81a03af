"""The statistics of a running system.

python examples/system_stats.py [model folder]
"""

import sys
from pathlib import Path

from hbserve.pd_disagg import LLM
from hbserve.sampling_params import SamplingParams

DEMO_MODEL = Path(__file__).resolve().parent / "models" / "hbserve-demo"

with LLM(sys.argv[1] if len(sys.argv) > 1 else str(DEMO_MODEL), log_level="WARNING") as llm:
    questions = [f"What is {number} + 38?" for number in range(40, 50)]
    conversations = [[{"role": "user", "content": question}] for question in questions]
    llm.chat(conversations, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
    stats = llm.get_system_stats()

scheduler = stats["cpu_scheduler"]
print("CPU scheduler:")
print(f"  total requests: {scheduler['total_requests']}")
print(f"  completed requests: {scheduler['completed_requests']}")
print(f"  success rate: {scheduler['success_rate']:.2%}")
print(f"  prompt tokens: {scheduler['prompt_tokens']}, {scheduler['cached_prompt_tokens']} of them cached")
print(f"  generated tokens: {scheduler['generated_tokens']}")

print("GPU instances:")
for instance_id, instance in stats["gpu_instances"].items():
    blocks = instance["kv_blocks"]
    print(f"  {instance_id}:")
    print(f"    status: {instance['status']}")
    print(f"    device: {instance['device']}")
    print(f"    active requests: {instance['active_requests']}")
    print(f"    steps: {instance['steps']}")
    print(f"    KV blocks: {blocks['free']} of {blocks['total']} free, {blocks['cached']} with reusable contents")

print("KV transfer:")
for link, moved in stats["kv_transfer"]["links"].items():
    print(f"  {link}: {moved['bytes']} bytes in {moved['transfers']} transfers")
