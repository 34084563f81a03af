"""Configuration of a system: frozen, validated when made, and the same in every process.

`load` reads a YAML file and `from_dict` takes plain data; both return a `Config`. Errors name the key,
the file, the line and the nearest valid name. Python users write the flat, changeable `PdDisaggConfig`, which
`freeze` turns into a `Config`.
"""

from hbserve.config.kv import DiskTierConfig, KVCacheConfig, KVTransferConfig, StoreTierConfig
from hbserve.config.sections import (
    MAX_DRAFT_TOKENS,
    ChunkedPrefillConfig,
    Config,
    CudaGraphConfig,
    InstanceConfig,
    InstanceRole,
    LoggingConfig,
    Mode,
    ModelConfig,
    PerformanceConfig,
    RpcConfig,
    SchedulerConfig,
    ServerConfig,
    SpeculationConfig,
    TelemetryConfig,
)
from hbserve.config.semi_pd import LadderConfig, SemiPDConfig, SLOConfig
from hbserve.config.validation import from_dict
from hbserve.config.yaml_file import load

__all__ = [
    "MAX_DRAFT_TOKENS",
    "ChunkedPrefillConfig",
    "Config",
    "CudaGraphConfig",
    "DiskTierConfig",
    "InstanceConfig",
    "InstanceRole",
    "KVCacheConfig",
    "KVTransferConfig",
    "LadderConfig",
    "LoggingConfig",
    "Mode",
    "ModelConfig",
    "PerformanceConfig",
    "RpcConfig",
    "SLOConfig",
    "SchedulerConfig",
    "SemiPDConfig",
    "ServerConfig",
    "SpeculationConfig",
    "StoreTierConfig",
    "TelemetryConfig",
    "from_dict",
    "load",
]
