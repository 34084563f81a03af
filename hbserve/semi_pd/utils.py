"""Roles, the choice of an instance, and the partition of a worker."""

from __future__ import annotations

import msgspec

from hbserve.config import Config, InstanceConfig, InstanceRole, from_dict
from hbserve.config.flat import PdDisaggConfig
from hbserve.errors import ConfigError
from hbserve.platform import Partition

__all__ = ["PHASES", "ROLES", "InstanceRole", "partition_of", "semi_pd_system"]

PHASES = (InstanceRole.PREFILL, InstanceRole.DECODE)
ROLES = (*PHASES, InstanceRole.UNIFIED)
"""Roles of workers: one phase, or both in the same steps."""


def semi_pd_system(server_args: Config | PdDisaggConfig, gpu_id: int = 0) -> tuple[Config, InstanceConfig]:
    """Get a system and its ``semi_pd`` instance on a GPU from a configuration of any mode.

    Raises:
        TypeError: if ``server_args`` is no configuration of HBServe.
        ConfigError: naming what cannot be honoured.
    """
    if not isinstance(server_args, Config | PdDisaggConfig):
        raise TypeError(f"server_args must be a PdDisaggConfig or a Config, got {type(server_args).__name__}")
    config = server_args.freeze() if isinstance(server_args, PdDisaggConfig) else server_args
    for instance in config.gpu_instances:
        if instance.instance_type is InstanceRole.SEMI_PD and instance.gpu_id == gpu_id:
            return config, instance
    if config.mode == "semi_pd":
        raise ConfigError(f"gpu_instances: there is no semi_pd instance on GPU {gpu_id}", "gpu_instances")
    instance = InstanceConfig(instance_id="semi-0", instance_type=InstanceRole.SEMI_PD, gpu_id=gpu_id, kv_rank=0)
    document = msgspec.to_builtins(config) | {"mode": "semi_pd", "gpu_instances": [msgspec.to_builtins(instance)]}
    complete = from_dict(document)
    return complete, complete.instance(instance.instance_id)


def partition_of(phase: InstanceRole, percentage: int, priority: int) -> Partition:
    """Make a worker's partition: prefill has the device's first multiprocessors, decode its last."""
    return Partition(percentage, "last" if phase is InstanceRole.DECODE else "first", priority)
