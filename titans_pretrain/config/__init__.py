"""The whole run as one frozen, validated tree: RunConfig.

defaults <- YAML file <- `a.b=c` on the command line. Unknown keys are refused with their path and
the nearest known name; the resolved tree is saved with the run and with each checkpoint. It is
handed down, never fetched, never changed. Imports neither torch nor any engine.
"""

from titans_pretrain.config.data import CacheConfig, DataConfig, SetConfig, SourceConfig, weight_at
from titans_pretrain.config.hardware import Figure, HardwareConfig
from titans_pretrain.config.load import (
    apply_override,
    dump_config,
    load_config,
    load_hardware,
    load_site,
    parse_config,
)
from titans_pretrain.config.model import MemoryConfig, ModelConfig
from titans_pretrain.config.run import (
    CheckpointConfig,
    DivergenceConfig,
    LogConfig,
    OptimConfig,
    ParallelConfig,
    ProfileConfig,
    RampConfig,
    RunConfig,
    SampleConfig,
    StragglerConfig,
    TrainConfig,
    ValidationConfig,
    WatchdogConfig,
    ZeroConfig,
)
from titans_pretrain.config.section import ALIGNMENTS
from titans_pretrain.config.site import PreflightConfig, SiteConfig

__all__ = [
    "ALIGNMENTS",
    "CacheConfig",
    "CheckpointConfig",
    "DataConfig",
    "DivergenceConfig",
    "Figure",
    "HardwareConfig",
    "LogConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "PreflightConfig",
    "ProfileConfig",
    "RampConfig",
    "RunConfig",
    "SampleConfig",
    "SetConfig",
    "SiteConfig",
    "SourceConfig",
    "StragglerConfig",
    "TrainConfig",
    "ValidationConfig",
    "WatchdogConfig",
    "ZeroConfig",
    "apply_override",
    "dump_config",
    "load_config",
    "load_hardware",
    "load_site",
    "parse_config",
    "weight_at",
]
