"""Where instances go that nobody has placed."""

from __future__ import annotations

import logging

import msgspec

from hbserve.config import Config
from hbserve.config_checks import default_instances
from hbserve.platform.mps import num_visible_gpus

logger = logging.getLogger(__name__)


def fit_to_gpus(config: Config) -> Config:
    """The configuration for this machine: default instances share GPUs where there are too few for all of them.

    Instances that somebody has placed stay where they are, and say so themselves if there is no such GPU.
    """
    instances = config.gpu_instances
    if len(instances) == 1 or config.model.device == "cpu" or config.launcher == "ray":
        return config
    if instances != default_instances(config.mode, config.model.tensor_parallel_size):
        return config
    count = num_visible_gpus()
    largest = max(instance.num_ranks for instance in instances)
    if count < largest or all(instance.gpu_id + instance.num_ranks <= count for instance in instances):
        return config  # none at all is a CPU, and too few for one instance is what it will say
    names = " and ".join(instance.instance_id for instance in instances)
    logger.warning("%s share GPU 0: this machine has %d; mode semi_pd is made for that", names, count)
    shared = tuple(msgspec.structs.replace(instance, gpu_id=0) for instance in instances)
    # Each takes its part of what is free, and none knows whether the others have taken theirs.
    performance = msgspec.structs.replace(
        config.performance, memory_fraction=config.performance.memory_fraction / len(instances)
    )
    return msgspec.structs.replace(config, gpu_instances=shared, performance=performance)
