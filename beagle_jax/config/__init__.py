"""Settings of all commands: frozen pydantic models, read from YAML.

Each section is a module, and each setting is a field of its model. The field is the only place that
states the default, unit and range of a setting. `reading` builds a `Config` from files and
`section.key=value` overrides, `identity` selects the settings that decide a result, and `schema`
writes the reference page and the JSON Schema for editors.
"""

from beagle_jax.config.data import COLDEST, DataConfig
from beagle_jax.config.decode import DecodeConfig
from beagle_jax.config.draft import DraftConfig
from beagle_jax.config.eval import EvalConfig
from beagle_jax.config.identity import Identity
from beagle_jax.config.log import LogConfig
from beagle_jax.config.mesh import MeshConfig
from beagle_jax.config.older import ALIASES
from beagle_jax.config.reading import load_config, read_settings, resolve_config
from beagle_jax.config.section import Result, Section
from beagle_jax.config.serve import ServeConfig
from beagle_jax.config.stage import EarlyStage, LateStage, StageConfig, TestTimeStage
from beagle_jax.config.target import TargetConfig
from beagle_jax.config.train import TrainConfig
from beagle_jax.config.whole import Config
from beagle_jax.config.yaml_text import parse_override, parse_yaml

__all__ = [
    "ALIASES",
    "COLDEST",
    "Config",
    "DataConfig",
    "DecodeConfig",
    "DraftConfig",
    "EarlyStage",
    "EvalConfig",
    "Identity",
    "LateStage",
    "LogConfig",
    "MeshConfig",
    "Result",
    "Section",
    "ServeConfig",
    "StageConfig",
    "TargetConfig",
    "TestTimeStage",
    "TrainConfig",
    "load_config",
    "parse_override",
    "parse_yaml",
    "read_settings",
    "resolve_config",
]
