"""Tests of the configurations: to JSON and back, and what is refused with which message."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from patchcore import configs
from patchcore.config_json import config_from_dict, config_to_dict
from patchcore.configs import (
    AutoencoderConfig,
    BackboneConfig,
    BackboneWeights,
    DatasetConfig,
    DemoConfig,
    EnsembleConfig,
    EpochConfig,
    FastFlowConfig,
    FeatureAutoencoderConfig,
    LaunchConfig,
    OutputConfig,
    PatchCoreConfig,
    PostProcessingConfig,
    PreprocessingConfig,
    ResNetKNNConfig,
    RunConfig,
    RuntimeConfig,
    SamplerConfig,
    ShardsConfig,
    ThresholdRule,
    TileConfig,
    TrackingConfig,
    TrainingConfig,
    TrainingSource,
    near_matches,
)
from patchcore.errors import ConfigurationError

BACKBONE = BackboneConfig("resnet18", ("layer2", "layer3"))

# Every configuration with its defaults, and with every field set to something else.
EXAMPLES: list[Any] = [
    PreprocessingConfig(),
    PreprocessingConfig(320, 288, "letterbox"),
    PreprocessingConfig(max_side_px=1024),
    DatasetConfig("mpdd", "data"),
    DatasetConfig("mvtec", "a b", ("bottle", "tile"), 0.8, 16, 0, PreprocessingConfig(64, 32, "square"), 10, 3),
    DemoConfig(),
    DemoConfig(("metal_plate",), 64, 3, 2, 1, 5),
    SamplerConfig(),
    SamplerConfig("identity", 1.0),
    SamplerConfig("greedy_coreset", 0.5, ShardsConfig(8, 1000)),
    ShardsConfig(2),
    BACKBONE,
    BackboneConfig("vgg11", ("features.10",), "some/file.pth", "backbone", 7),
    PatchCoreConfig(BACKBONE),
    PatchCoreConfig(BACKBONE, SamplerConfig("random", 0.5), "pooled", 384, 100, 5, 1),
    PatchCoreConfig(BACKBONE, embedding="concat", patchsize_aggregate=(5, 7), score_reweighting=9, seed=2),
    PatchCoreConfig(BACKBONE, patchscore="topk"),
    EnsembleConfig((PatchCoreConfig(BACKBONE), PatchCoreConfig(BACKBONE, seed=1)), "minmax"),
    TrainingConfig(),
    TrainingConfig(3, 4, 1e-2, 0.0, "cosine", None, 2),
    FastFlowConfig(BACKBONE),
    FastFlowConfig(
        BACKBONE, 4, 0.5, True, 1.9, 0.1, TrainingConfig(2), "weighted", "topk", "bfloat16", calibration_folds=5
    ),
    FastFlowConfig(BACKBONE, post_processing=PostProcessingConfig(smoothing="guided"), tiles=TileConfig(160, 80)),
    ResNetKNNConfig(BackboneConfig("vgg11", ("features.10",))),
    ResNetKNNConfig(BackboneConfig("vgg11", ("features.10",)), 20, 3, True),
    AutoencoderConfig(),
    AutoencoderConfig(8, TrainingConfig(2), 2.0, "topk", 5),
    FeatureAutoencoderConfig(BACKBONE),
    FeatureAutoencoderConfig(BACKBONE, 3, 16, 0.8, True, 0.2, 0.1, TrainingConfig(2), 2.0, "mean", 4),
    PostProcessingConfig(),
    PostProcessingConfig("gaussian", 2.5, True, (0.75, 1.25)),
    TileConfig(64, 32),
    TileConfig(64, 64, 9, True),
    RuntimeConfig(),
    RuntimeConfig(faiss_on_gpu=True, faiss_num_workers=2),
    RuntimeConfig("cuda:1", (1, 0), 4),
    TrainingSource(),
    TrainingSource("mpdd", "tubes", 3),
    OutputConfig(),
    OutputConfig(True, True, True),
    LaunchConfig(),
    LaunchConfig("ray", None, "auto", 0.5, 4),
    RunConfig("results"),
    RunConfig(
        "r",
        "p",
        "g",
        (2, 0),
        "split",
        outputs=OutputConfig(True),
        skip_existing=True,
        runtime=RuntimeConfig("cpu", (), 1),
        tracking=TrackingConfig(True, True),
        launch=LaunchConfig(workers=3),
    ),
    EpochConfig(eval_every=2, checkpoint_every=None),
    TrackingConfig(),
    BackboneWeights("resnet18", "00ff"),
    ThresholdRule("quantile", 0.95),
]


def from_dict(cls: type[Any], mapping: object) -> Any:
    return config_from_dict(cls, mapping, "config.json")


def refused(cls: type[Any], mapping: object) -> str:
    """Return the message with which a mapping is refused: one line that says where."""
    with pytest.raises(ConfigurationError) as caught:
        from_dict(cls, mapping)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_examples_cover_every_configuration() -> None:
    known = {c for c in vars(configs).values() if dataclasses.is_dataclass(c)}
    assert known == {type(example) for example in EXAMPLES}


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda c: type(c).__name__)
def test_round_trip_through_json(config: Any) -> None:
    text = json.dumps(config_to_dict(config), allow_nan=False)
    assert from_dict(type(config), json.loads(text)) == config


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda c: type(c).__name__)
def test_configurations_are_frozen_and_hashable(config: Any) -> None:
    name = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, None)
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda c: type(c).__name__)
def test_unknown_names_are_refused_at_every_level(config: Any) -> None:
    mapping = config_to_dict(config)
    assert "'colour'" in refused(type(config), {**mapping, "colour": 1})
    for name, value in mapping.items():
        if isinstance(value, dict):
            message = refused(type(config), {**mapping, name: {**value, "colour": 1}})
            assert message.startswith(f"config.json.{name}: unknown name 'colour'")


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda c: type(c).__name__)
def test_values_of_another_type_are_refused_and_named(config: Any) -> None:
    """A list is right where a list is expected, but not one of objects; everything else refuses a list."""
    mapping = config_to_dict(config)
    for name in mapping:
        message = refused(type(config), {**mapping, name: [{}]})
        assert message.startswith(f"config.json.{name}")


def test_unknown_name_comes_with_near_matches() -> None:
    message = refused(DatasetConfig, {"name": "mpdd", "path": "x", "batchsize": 3})
    assert message == "config.json: unknown name 'batchsize': did you mean batch_size?"


def test_missing_name_is_named() -> None:
    assert refused(BackboneConfig, {"name": "resnet18"}) == "config.json: 'layers' is missing"
    assert refused(PatchCoreConfig, {}) == "config.json: 'backbone' is missing"
    assert refused(PatchCoreConfig, {"backbone": {"name": "x"}}) == "config.json.backbone: 'layers' is missing"


@pytest.mark.parametrize(
    ("cls", "name", "value", "found", "expected"),
    [
        (RuntimeConfig, "faiss_num_workers", True, "True", "int"),
        (RuntimeConfig, "faiss_num_workers", 2.0, "2.0", "int"),
        (RuntimeConfig, "faiss_num_workers", "2", "'2'", "int"),
        (RuntimeConfig, "faiss_on_gpu", 1, "1", "bool"),
        (RuntimeConfig, "faiss_on_gpu", None, "None", "bool"),
        (RuntimeConfig, "faiss_on_gpu", "false", "'false'", "bool"),
        (SamplerConfig, "percentage", True, "True", "float"),
        (SamplerConfig, "percentage", "0.1", "'0.1'", "float"),
        (SamplerConfig, "name", None, "None", "str"),
        (SamplerConfig, "name", 3, "3", "str"),
        (RuntimeConfig, "threads", False, "False", "int"),
        (RuntimeConfig, "threads", 1.5, "1.5", "int"),
        (RuntimeConfig, "gpus", "0", "str", "a list"),
        (RuntimeConfig, "gpus", 0, "int", "a list"),
        (RuntimeConfig, "gpus", None, "NoneType", "a list"),
        (RunConfig, "seeds", {"0": 0}, "dict", "a list"),
        (RunConfig, "outputs", None, "NoneType", "an object"),
        (RunConfig, "outputs", [], "list", "an object"),
        (RunConfig, "outputs", "yes", "str", "an object"),
    ],
)
def test_wrong_types(cls: type[Any], name: str, value: object, found: str, expected: str) -> None:
    rest = {"results_path": "r"} if cls is RunConfig else {}
    assert refused(cls, {**rest, name: value}) == f"config.json.{name}: found {found}, expected {expected}"


def test_wrong_element_of_a_list_is_named_by_its_place() -> None:
    message = refused(BackboneConfig, {"name": "resnet18", "layers": ["layer2", 3]})
    assert message == "config.json.layers[1]: found 3, expected str"
    message = refused(RunConfig, {"results_path": "r", "seeds": [0, 1, True]})
    assert message == "config.json.seeds[2]: found True, expected int"


@pytest.mark.parametrize("mapping", [None, [], "text", 3])
def test_configuration_that_is_no_object(mapping: object) -> None:
    assert refused(RuntimeConfig, mapping) == f"config.json: found {type(mapping).__name__}, expected an object"


def test_whole_numbers_are_accepted_as_float_and_null_where_optional() -> None:
    sampler = from_dict(SamplerConfig, {"percentage": 1})
    assert sampler.percentage == 1.0
    assert type(sampler.percentage) is float
    assert from_dict(RuntimeConfig, {"threads": None}).threads is None


def test_a_whole_number_beyond_all_floats_is_refused() -> None:
    assert "larger than any float" in refused(SamplerConfig, {"percentage": 10**400})


def test_values_from_json_are_validated_as_well() -> None:
    assert "percentage is 2.0" in refused(SamplerConfig, {"percentage": 2})
    assert "is inf" in refused(SamplerConfig, {"percentage": json.loads("1e999")})
    assert "is nan" in refused(SamplerConfig, {"percentage": json.loads("NaN")})
    assert "--patchsize is 2" in refused(PatchCoreConfig, {**config_to_dict(PatchCoreConfig(BACKBONE)), "patchsize": 2})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PreprocessingConfig(224, 256), "--imagesize 256 is larger than --resize 224"),
        (lambda: PreprocessingConfig(imagesize_px=31), "--imagesize is 31, expected 32 or more"),
        (
            lambda: PreprocessingConfig(resize_mode="leterbox"),
            "unknown resize mode 'leterbox': did you mean letterbox?",
        ),
        (lambda: DatasetConfig("mpdd", "d", train_val_split=0.0), "--train_val_split is 0.0"),
        (lambda: DatasetConfig("mpdd", "d", batch_size=0), "--batch_size is 0, expected 1 or more"),
        (lambda: DatasetConfig("mpdd", "d", num_workers=-1), "--num_workers is -1, expected 0 or more"),
        (lambda: DatasetConfig("mpdd", "d", limit_train=0), "--limit_train is 0"),
        (lambda: DatasetConfig("mpdd", "d", limit_test=0), "--limit_test is 0"),
        (lambda: DatasetConfig("mpdd", "d", ("a", "b", "a")), "class a is named more than once"),
        (lambda: SamplerConfig(percentage=0.0), "sampler --percentage is 0.0, expected a share in"),
        (lambda: SamplerConfig(percentage=1.01), "sampler --percentage is 1.01"),
        (lambda: SamplerConfig(percentage=-0.1), "sampler --percentage is -0.1"),
        (lambda: SamplerConfig(percentage=float("nan")), "sampler --percentage is nan"),
        (lambda: BackboneConfig("resnet18", ()), "'resnet18' has no layer: name at least one, such as"),
        (lambda: BackboneConfig("resnet18", ("layer2", "layer2")), "a layer is named twice in layer2, layer2"),
        (lambda: BackboneConfig("resnet18", ("a",), normalization="imagnet"), "did you mean imagenet?"),
        (lambda: PatchCoreConfig(BACKBONE, embedding="pool"), "unknown embedding 'pool': did you mean pooled?"),
        (lambda: PatchCoreConfig(BACKBONE, pretrain_embed_dimension=0), "--pretrain_embed_dimension is 0"),
        (lambda: PatchCoreConfig(BACKBONE, target_embed_dimension=0), "--target_embed_dimension is 0"),
        (lambda: PatchCoreConfig(BACKBONE, patchsize=0), "--patchsize is 0"),
        (lambda: PatchCoreConfig(BACKBONE, patchsize=4), "--patchsize is 4, expected an odd number"),
        (lambda: PatchCoreConfig(BACKBONE, num_nn=0), "--anomaly_scorer_num_nn is 0, expected 1 or more"),
        (lambda: PatchCoreConfig(BACKBONE, embedding="concat", target_embed_dimension=512), "1024 and 512 were asked"),
        (lambda: RuntimeConfig(faiss_num_workers=0), "--faiss_num_workers is 0"),
        (lambda: RuntimeConfig(threads=0), "--threads is 0"),
        (lambda: RunConfig("r", calibration="kfolds"), "unknown calibration 'kfolds': did you mean kfold?"),
        (lambda: RunConfig("r", seeds=()), "no seed: name at least one --seed"),
        (lambda: RunConfig("r", seeds=(0, -1)), "--seed is -1, expected 0 or more"),
        (lambda: RunConfig("r", seeds=(1, 1)), "a seed is named twice"),
        (lambda: RunConfig("r", log_group=" "), "--log_group is ' '"),
        (lambda: RunConfig("r", log_group="../up"), "--log_group is '../up', expected the plain name of one folder"),
        (lambda: RunConfig("r", log_project=".."), "--log_project is '..'"),
        (lambda: RunConfig("r", log_project="a\\b"), "--log_project is"),
    ],
)
def test_values_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_limits_of_the_ranges_are_inside() -> None:
    assert SamplerConfig(percentage=1.0).percentage == 1.0
    assert SamplerConfig(percentage=1e-9).percentage == 1e-9
    assert PreprocessingConfig(32, 32).imagesize_px == 32
    assert PatchCoreConfig(BACKBONE, patchsize=1, num_nn=1).patchsize == 1


def test_near_matches() -> None:
    assert near_matches("resnet19", ["resnet18", "vgg11"]) == "did you mean resnet18?"
    assert near_matches("zzz", ["b", "a"]) == "known: a, b"
