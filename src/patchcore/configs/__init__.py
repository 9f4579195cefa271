"""Frozen configurations of data sets, methods and runs.

A configuration is complete and valid once it is constructed.
"""

from patchcore.configs.backbone import NORMALIZATIONS, BackboneConfig, BackboneWeights
from patchcore.configs.baselines import AutoencoderConfig, FeatureAutoencoderConfig, ResNetKNNConfig
from patchcore.configs.checks import (
    MAX_LIST_LENGTH,
    MAX_SEED,
    near_matches,
    require_at_least,
    require_choice,
    require_fraction,
    require_not_negative,
    require_positive,
)
from patchcore.configs.data import (
    DEMO_CATEGORIES,
    RESIZE_MODES,
    DatasetConfig,
    DemoConfig,
    PreprocessingConfig,
    TrainingSource,
)
from patchcore.configs.fastflow import (
    IMAGE_SCORES,
    MAP_MODES,
    PRECISIONS,
    SCHEDULES,
    SMOOTHINGS,
    FastFlowConfig,
    PostProcessingConfig,
    TileConfig,
    TrainingConfig,
)
from patchcore.configs.launching import LAUNCHERS, LOCAL, RAY, LaunchConfig
from patchcore.configs.patchcore import (
    EMBEDDINGS,
    INDEXES,
    PATCH_SCORES,
    SCORE_NORMALIZATIONS,
    EnsembleConfig,
    PatchCoreConfig,
    SamplerConfig,
    ShardsConfig,
)
from patchcore.configs.run import (
    BACKBONE_PRECISIONS,
    CALIBRATION_METHODS,
    EpochConfig,
    OutputConfig,
    RunConfig,
    RuntimeConfig,
    TrackingConfig,
)
from patchcore.configs.thresholds import THRESHOLD_RULES, ThresholdRule

__all__ = [
    "BACKBONE_PRECISIONS",
    "CALIBRATION_METHODS",
    "DEMO_CATEGORIES",
    "EMBEDDINGS",
    "IMAGE_SCORES",
    "INDEXES",
    "LAUNCHERS",
    "LOCAL",
    "MAP_MODES",
    "MAX_LIST_LENGTH",
    "MAX_SEED",
    "NORMALIZATIONS",
    "PATCH_SCORES",
    "PRECISIONS",
    "RAY",
    "RESIZE_MODES",
    "SCHEDULES",
    "SCORE_NORMALIZATIONS",
    "SMOOTHINGS",
    "THRESHOLD_RULES",
    "AutoencoderConfig",
    "BackboneConfig",
    "BackboneWeights",
    "DatasetConfig",
    "DemoConfig",
    "EnsembleConfig",
    "EpochConfig",
    "FastFlowConfig",
    "FeatureAutoencoderConfig",
    "LaunchConfig",
    "OutputConfig",
    "PatchCoreConfig",
    "PostProcessingConfig",
    "PreprocessingConfig",
    "ResNetKNNConfig",
    "RunConfig",
    "RuntimeConfig",
    "SamplerConfig",
    "ShardsConfig",
    "ThresholdRule",
    "TileConfig",
    "TrackingConfig",
    "TrainingConfig",
    "TrainingSource",
    "near_matches",
    "require_at_least",
    "require_choice",
    "require_fraction",
    "require_not_negative",
    "require_positive",
]
