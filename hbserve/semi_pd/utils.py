"""Roles, the choice of an instance, and the partition of a worker."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import msgspec

from hbserve.config import Config, InstanceConfig, InstanceRole, from_dict
from hbserve.config.flat import PdDisaggConfig
from hbserve.errors import ConfigError
from hbserve.lazy import lazy_attributes
from hbserve.model_store import with_model_folder
from hbserve.platform import Partition

if TYPE_CHECKING:
    from hbserve.platform.ipc import convert_ipc_handle_to_tensor, get_ipc_handle

__all__ = [
    "PHASES",
    "ROLES",
    "InstanceRole",
    "convert_ipc_handle_to_tensor",
    "get_ipc_handle",
    "partition_of",
    "semi_pd_system",
]

logger = logging.getLogger(__name__)

__getattr__: Any = lazy_attributes(  # they need torch, which the launcher does not
    {name: "hbserve.platform.ipc" for name in ("convert_ipc_handle_to_tensor", "get_ipc_handle")}, __name__
)

PHASES = (InstanceRole.PREFILL, InstanceRole.DECODE)
ROLES = (*PHASES, InstanceRole.UNIFIED)
"""Roles of workers: one phase, or both in the same steps."""


def semi_pd_system(
    server_args: Config | PdDisaggConfig, gpu_id: int = 0, port_args: Any = None
) -> tuple[Config, InstanceConfig]:
    """Get a system and its ``semi_pd`` instance on a GPU from a configuration of any mode.

    Args:
        port_args: object whose ``host`` and ``port`` replace those of the configuration's HTTP server. The processes
            of an instance have no ports: they find each other by private sockets.

    Raises:
        TypeError: if ``server_args`` is no configuration of HBServe.
        ConfigError: naming what cannot be honoured.
    """
    if not isinstance(server_args, Config | PdDisaggConfig):
        raise TypeError(f"server_args must be a PdDisaggConfig or a Config, got {type(server_args).__name__}")
    config = server_args.freeze() if isinstance(server_args, PdDisaggConfig) else server_args
    config = _with_ports(with_model_folder(config), port_args)
    for instance in config.gpu_instances:
        if instance.instance_type is InstanceRole.SEMI_PD and instance.gpu_id == gpu_id:
            return config, instance
    if config.mode == "semi_pd":
        raise ConfigError(f"gpu_instances: there is no semi_pd instance on GPU {gpu_id}", "gpu_instances")
    instance = InstanceConfig(instance_id="semi-0", instance_type=InstanceRole.SEMI_PD, gpu_id=gpu_id, kv_rank=0)
    document = msgspec.to_builtins(config) | {"mode": "semi_pd", "gpu_instances": [msgspec.to_builtins(instance)]}
    complete = from_dict(document)
    return complete, complete.instance(instance.instance_id)


def _with_ports(config: Config, port_args: Any) -> Config:
    given = {name: getattr(port_args, name, None) for name in ("host", "port")}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        if port_args is not None:
            logger.warning("port_args has neither host nor port: processes find each other by private sockets")
        return config
    document = msgspec.to_builtins(config)
    return from_dict(document | {"server": document["server"] | given})


def partition_of(phase: InstanceRole, percentage: int, priority: int) -> Partition:
    """Make a worker's partition: prefill has the device's first multiprocessors, decode its last."""
    return Partition(percentage, "last" if phase is InstanceRole.DECODE else "first", priority)
