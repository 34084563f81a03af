"""Reference outputs, and what must hold of any system after its work is done."""

from __future__ import annotations

import time
from ctypes.util import find_library
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.model_zoo import VOCAB_SIZE

HAS_MOONCAKE = find_spec("mooncake") is not None and find_library("ibverbs") is not None
needs_mooncake = pytest.mark.skipif(
    not HAS_MOONCAKE,
    reason="needs the Mooncake Transfer Engine and libibverbs: scripts/install_debian_packages.sh",
)


def random_prompt(length: int, seed: int) -> list[int]:
    """Token ids from 1 up, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist()


@torch.inference_mode()
def greedy_reference(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers' own greedy decoding makes of a prompt."""
    input_ids = torch.tensor([prompt])
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def leaks(stats: dict[str, Any]) -> list[str]:
    """What has not come back: requests, transfers, steps, or KV blocks."""
    found = []
    if stats["cpu_scheduler"]["open_requests"]:
        found.append(f"{stats['cpu_scheduler']['open_requests']} open requests")
    if stats["kv_transfer"]["open_transfers"]:
        found.append(f"{stats['kv_transfer']['open_transfers']} open transfers")
    for name, instance in stats["gpu_instances"].items():
        if instance["status"] != "ready":
            found.append(f"{name} is {instance['status']}")
            continue
        if instance["active_requests"] or instance["steps_in_flight"]:
            found.append(f"{name} still has work")
        if instance["kv_blocks"]["free"] != instance["kv_blocks"]["total"]:
            found.append(f"{name} has {instance['kv_blocks']['free']} of {instance['kv_blocks']['total']} blocks free")
    return found


def assert_no_leaks(llm: Any, deadline_s: float = 20.0) -> None:
    """All blocks come back once what is in flight is confirmed.

    Args:
        llm: an `LLM` or `DisaggregatedLLM`.
    """
    deadline = time.monotonic() + deadline_s
    while found := leaks(llm.get_system_stats()):
        assert time.monotonic() < deadline, f"leaked: {', '.join(found)}"
        time.sleep(0.05)
