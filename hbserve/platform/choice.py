"""The choice of a process's device and of its share of that device."""

from __future__ import annotations

import os
from typing import Literal

import torch

from hbserve.errors import ConfigError
from hbserve.platform import Partition
from hbserve.platform.base import Platform
from hbserve.platform.cpu import CpuPlatform
from hbserve.platform.cuda import CudaPlatform

_LOW_PRIORITY_NICENESS = 5


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Replace ``auto`` by the device that this machine has.

    Raises:
        ConfigError: ``device`` is cuda and torch finds none.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("model.device: cuda is asked for, but torch finds no CUDA device; use cpu or auto")
    if device == "auto":
        return "cuda" if available else "cpu"
    return device


def make_platform(
    device: Literal["auto", "cpu", "cuda"],
    gpu_id: int,
    num_threads: int | None,
    num_instances: int,
    tp_rank: int = 0,
    tp_size: int = 1,
    partition: Partition | None = None,
) -> Platform:
    """Make the platform of one rank of an instance.

    Args:
        gpu_id: GPU of the instance's first rank; the other ranks use the GPUs after it.
        num_threads: threads on the CPU; None divides the cores evenly among ``num_instances`` of ``tp_size`` ranks.
        partition: share of the device, if workers share it. On a GPU its priority takes effect through
            `set_priority`, which must come first.

    Raises:
        ConfigError: this machine does not have the device.
    """
    if resolve_device(device) == "cpu":
        partition = partition or Partition()
        threads = num_threads or max(1, len(os.sched_getaffinity(0)) // (num_instances * tp_size))
        share = max(1, round(threads * partition.percentage / 100))
        return CpuPlatform(share, _LOW_PRIORITY_NICENESS * partition.priority)
    count = torch.cuda.device_count()
    if gpu_id + tp_size > count:
        gpus = f"gpu_id {gpu_id}" if tp_size == 1 else f"gpu_id {gpu_id} with tensor_parallel_size {tp_size}"
        raise ConfigError(
            f"{gpus}: this machine has {count} GPU(s), numbered from 0; "
            "instances may share one (gpu_id, performance.memory_fraction), which mode semi_pd is made for"
        )
    return CudaPlatform(gpu_id + tp_rank, partition)


def set_priority(priority: int) -> None:
    """Set this process's priority under MPS; must be called before the CUDA driver is initialised.

    The driver reads the priority once, and it cannot change afterwards (https://docs.nvidia.com/deploy/mps).
    """
    os.environ["CUDA_MPS_CLIENT_PRIORITY"] = str(priority)
