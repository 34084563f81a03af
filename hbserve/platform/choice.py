"""Which device a process works on, and with which share of it."""

from __future__ import annotations

import os
from typing import Literal

import torch

from hbserve.errors import ConfigError
from hbserve.platform.base import Partition, Platform
from hbserve.platform.cpu import CpuPlatform
from hbserve.platform.cuda import CudaPlatform

_NICENESS_OF_LOW_PRIORITY = 5


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """The device that ``auto`` stands for here.

    Raises:
        ConfigError: if CUDA is asked for and not there.
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
    """The platform of one rank of an instance.

    Args:
        gpu_id: of the instance's first rank; the others' follow.
        num_threads: on CPU; None shares the cores evenly among ``num_instances`` of ``tp_size`` ranks.
        partition: of the device; on a GPU `enter_partition` has to come first.

    Raises:
        ConfigError: if the device is not there.
    """
    partition = partition or Partition()
    if resolve_device(device) == "cpu":
        threads = num_threads or max(1, len(os.sched_getaffinity(0)) // (num_instances * tp_size))
        share = max(1, round(threads * partition.percentage / 100))
        return CpuPlatform(share, _NICENESS_OF_LOW_PRIORITY * partition.priority)
    count = torch.cuda.device_count()
    if gpu_id + tp_size > count:
        gpus = f"gpu_id {gpu_id}" if tp_size == 1 else f"gpu_id {gpu_id} with tensor_parallel_size {tp_size}"
        raise ConfigError(f"{gpus}: this machine has {count} GPU(s), numbered from 0")
    return CudaPlatform(gpu_id + tp_rank)


def partition_environment(partition: Partition) -> dict[str, str]:
    """The variables that give a process its share of a GPU under MPS; see `enter_partition`."""
    return {
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(partition.percentage),
        "CUDA_MPS_CLIENT_PRIORITY": str(partition.priority),
    }


def enter_partition(partition: Partition) -> None:
    """Set the share that this process' CUDA context will get under MPS; before anything touches the GPU.

    The driver reads both when it makes the context, and they cannot be changed afterwards
    (https://docs.nvidia.com/deploy/mps).
    """
    os.environ.update(partition_environment(partition))
