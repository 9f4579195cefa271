"""The commands `run_baselines` and `load_and_evaluate_baselines`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import click

from patchcore.cli.backbones import absolute_weights
from patchcore.cli.commands import (
    RESUME_OPTION,
    SAVE_MODEL_OPTION,
    STORED_OPTIONS,
    evaluate,
    evaluation,
    prepare_console,
    run_config,
    run_options,
    train,
)
from patchcore.cli.grammar import ChainedCommand
from patchcore.cli.steps import (
    AUGMENT_OPTION,
    CATEGORIES_OPTION,
    DATASET_ARGUMENTS,
    TRAIN_VAL_SPLIT_OPTION,
    refuse_augment,
    stored_dataset_step,
    with_options,
)
from patchcore.cli.training_options import EPOCH_OPTIONS, require_held_out_for, training_options, typed_training
from patchcore.cli.typed_dataset import DEFAULT_IMAGESIZE_PX, TYPED_READING_OPTIONS, TypedDataset
from patchcore.configs import (
    IMAGE_SCORES,
    NORMALIZATIONS,
    RESIZE_MODES,
    AutoencoderConfig,
    BackboneConfig,
    EpochConfig,
    FeatureAutoencoderConfig,
    ResNetKNNConfig,
    TrainingConfig,
)

METHODS = ("resnet_knn", "autoencoder", "feature_autoencoder")
DEFAULT_BACKBONE = "resnet50"
FEATURE_TRAINING: TrainingConfig = FeatureAutoencoderConfig(BackboneConfig("any", ("any",))).training

BACKBONE_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("-b", "--backbone", default=DEFAULT_BACKBONE, show_default=True, help="Backbone (see the README)."),
    click.option("--weights", default="pretrained", show_default=True, help="pretrained, random or a path."),
    click.option(
        "--normalization",
        type=click.Choice(NORMALIZATIONS),
        default="imagenet",
        show_default=True,
        help="Mean and std of images: ImageNet's for all, or the backbone's own.",
    ),
)

MAP_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--smoothing_px",
        type=float,
        default=AutoencoderConfig.smoothing_px,
        show_default=True,
        help="Standard deviation of the Gaussian that smooths maps, px.",
    ),
    click.option(
        "--image_score",
        type=click.Choice(IMAGE_SCORES),
        default=AutoencoderConfig.image_score,
        show_default=True,
        help="What of a map is the score of its image.",
    ),
)


@dataclass(frozen=True)
class TypedBaseline:
    """A method as typed.

    Attributes:
        method: Name in the registry.
        config: Makes its configuration; looks up the layers of the backbone, which takes the network.
        epochs: What happens between epochs; None for methods without any.
    """

    method: str
    config: Callable[[], Any]
    epochs: EpochConfig | None = None


@click.group("run_baselines", cls=ChainedCommand, required_steps=(METHODS, "dataset"))
@click.argument("results_path")
@with_options(*run_options(SAVE_MODEL_OPTION, RESUME_OPTION))
def run_baselines(**options: Any) -> None:
    """Train a baseline on good images and evaluate it: RESULTS_PATH, then the step of one method, and dataset.

    Tables, scores and pictures go to RESULTS_PATH/LOG_PROJECT/LOG_GROUP, or LOG_GROUP_0, _1, ... if that exists.
    """


@run_baselines.result_callback()
def _run(steps: list[tuple[str, Any]], **frame: Any) -> int:
    step = dict(steps)
    baseline: TypedBaseline = next(step[name] for name in METHODS if name in step)
    typed: TypedDataset = step["dataset"]
    run = run_config(**frame, epochs=baseline.epochs)
    dataset = typed.config(typed.preprocessing(typed.imagesize or DEFAULT_IMAGESIZE_PX))
    prepare_console()
    config = baseline.config()
    if baseline.epochs is not None:
        require_held_out_for(config.training.patience, dataset.train_val_split)
        if typed.batch_size is not None:
            config = replace(config, training=replace(config.training, batch_size=typed.batch_size))
    return train(baseline.method, lambda _: config, run, dataset)


@run_baselines.command("resnet_knn", short_help="The method: k-NN of pooled features, no map: [-b BACKBONE] [OPTIONS]")
@with_options(
    *BACKBONE_OPTIONS,
    click.option(
        "-le", "--layers_to_extract_from", "layers", multiple=True, help="The layer; the backbone's last if left out."
    ),
    click.option(
        "--num_features",
        type=int,
        default=ResNetKNNConfig.num_features,
        show_default=True,
        help="Features kept, of the largest standard deviation over the training images.",
    ),
    click.option(
        "-k",
        "--num_neighbours",
        type=int,
        default=ResNetKNNConfig.num_neighbours,
        show_default=True,
        help="Training images whose distances are averaged; a class needs one image more.",
    ),
    click.option("--clamp_k", is_flag=True, help="Lower k where a class has too few training images."),
)
def resnet_knn_step(
    backbone: str,
    weights: str,
    normalization: str,
    layers: tuple[str, ...],
    num_features: int,
    num_neighbours: int,
    clamp_k: bool,
) -> tuple[str, TypedBaseline]:
    """Mean distance of an image's pooled features to those of the nearest training images; it has no map."""

    def config() -> ResNetKNNConfig:
        from patchcore.features.layers import last_layer

        chosen = BackboneConfig(backbone, layers or (last_layer(backbone),), absolute_weights(weights), normalization)
        return ResNetKNNConfig(chosen, num_features, num_neighbours, clamp_k)

    return "resnet_knn", TypedBaseline("resnet_knn", config)


@run_baselines.command("autoencoder", short_help="The method: an autoencoder of the images: [OPTIONS]")
@with_options(
    click.option(
        "--latent_channels",
        type=int,
        default=AutoencoderConfig.latent_channels,
        show_default=True,
        help="Channels of the bottleneck, whose sides are those of the image divided by 32.",
    ),
    *training_options(AutoencoderConfig().training),
    *EPOCH_OPTIONS,
    *MAP_OPTIONS,
)
def autoencoder_step(
    latent_channels: int,
    smoothing_px: float,
    image_score: str,
    eval_every: int | None,
    checkpoint_every: int,
    **training: Any,
) -> tuple[str, TypedBaseline]:
    """Squared error of a convolutional autoencoder of the images."""

    def config() -> AutoencoderConfig:
        typed = typed_training(AutoencoderConfig().training, training)
        return AutoencoderConfig(latent_channels, typed, smoothing_px, image_score)

    return "autoencoder", TypedBaseline("autoencoder", config, EpochConfig(eval_every, checkpoint_every))


@run_baselines.command(
    "feature_autoencoder", short_help="The method: an autoencoder of feature maps: [-b BACKBONE] [OPTIONS]"
)
@with_options(
    *BACKBONE_OPTIONS,
    click.option(
        "-le",
        "--layers_to_extract_from",
        "layers",
        multiple=True,
        help="Layer; repeatable; the backbone's middle ones if left out, layer2 and layer3 of a ResNet.",
    ),
    click.option(
        "--patchsize",
        type=int,
        default=FeatureAutoencoderConfig.patchsize,
        show_default=True,
        help="Side of the neighbourhood over which maps are averaged first, odd; 1 for none.",
    ),
    click.option(
        "--latent_channels",
        type=int,
        default=None,
        help="Bottleneck; by --explained_variance if left out.",
    ),
    click.option(
        "--explained_variance",
        type=float,
        default=None,
        help="Share of the variance held by as many principal components as the bottleneck is wide; "
        f"{FeatureAutoencoderConfig.explained_variance:g} if left out.",
    ),
    click.option("--variational", is_flag=True, help="A distribution over the bottleneck: sampled in training."),
    click.option(
        "--kl_weight",
        type=float,
        default=None,
        help="Weight of its divergence from a normal one, with --variational; "
        f"{FeatureAutoencoderConfig.kl_weight:g} if left out.",
    ),
    *training_options(FEATURE_TRAINING),
    click.option(
        "--feature_noise",
        type=float,
        default=FeatureAutoencoderConfig.feature_noise,
        show_default=True,
        help="Noise on the standardised features in training.",
    ),
    *EPOCH_OPTIONS,
    *MAP_OPTIONS,
)
def feature_autoencoder_step(
    backbone: str,
    weights: str,
    normalization: str,
    layers: tuple[str, ...],
    patchsize: int,
    latent_channels: int | None,
    explained_variance: float | None,
    variational: bool,
    kl_weight: float | None,
    feature_noise: float,
    smoothing_px: float,
    image_score: str,
    eval_every: int | None,
    checkpoint_every: int,
    **training: Any,
) -> tuple[str, TypedBaseline]:
    """Squared error of an autoencoder of the feature vectors at each place."""
    if kl_weight is not None and not variational:
        raise click.UsageError(f"--kl_weight {kl_weight:g} without --variational: type both, or leave --kl_weight out")
    if explained_variance is not None and latent_channels is not None:
        raise click.UsageError(
            f"--latent_channels {latent_channels} and --explained_variance {explained_variance:g} both say how wide "
            "the bottleneck is: leave one of them out"
        )

    def config() -> FeatureAutoencoderConfig:
        from patchcore.features.layers import middle_layers

        chosen = BackboneConfig(backbone, layers or middle_layers(backbone), absolute_weights(weights), normalization)
        default = FeatureAutoencoderConfig(chosen)
        return FeatureAutoencoderConfig(
            chosen,
            patchsize=patchsize,
            latent_channels=latent_channels,
            explained_variance=default.explained_variance if explained_variance is None else explained_variance,
            variational=variational,
            kl_weight=default.kl_weight if kl_weight is None else kl_weight,
            feature_noise=feature_noise,
            training=typed_training(default.training, training),
            smoothing_px=smoothing_px,
            image_score=image_score,
        )

    return "feature_autoencoder", TypedBaseline(
        "feature_autoencoder", config, EpochConfig(eval_every, checkpoint_every)
    )


@run_baselines.command("dataset", short_help="What to read: [OPTIONS] mvtec|mpdd|folder DATA_PATH")
@with_options(
    CATEGORIES_OPTION,
    TRAIN_VAL_SPLIT_OPTION,
    click.option("--resize", type=int, default=None, help="Length after the resize, px; 256 for 224 px images."),
    click.option("--imagesize", type=int, default=None, help="Side of the centre crop, px; 224 if left out."),
    click.option("--resize_mode", type=click.Choice(RESIZE_MODES), help="What --resize gives; shorter if left out."),
    *TYPED_READING_OPTIONS,
    AUGMENT_OPTION,
    *DATASET_ARGUMENTS,
)
def baseline_dataset_step(
    name: str, data_path: str, categories: tuple[str, ...], augment: bool, **typed: Any
) -> tuple[str, TypedDataset]:
    """Read images in the MVTec AD layout: NAME is mvtec, mpdd or folder, DATA_PATH holds the classes."""
    refuse_augment(augment)
    return "dataset", TypedDataset(name, data_path, categories, **typed)


@click.group("load_and_evaluate_baselines", cls=ChainedCommand, required_steps=("baseline_loader", "dataset"))
@click.argument("save_folder")
@with_options(*STORED_OPTIONS)
def load_and_evaluate_baselines(**options: Any) -> None:
    """Evaluate stored models: SAVE_FOLDER, then the steps baseline_loader and dataset."""


@load_and_evaluate_baselines.result_callback()
def _load_and_evaluate(steps: list[tuple[str, Any]], **frame: Any) -> int:
    step = dict(steps)
    dataset, settings = step["dataset"]
    return evaluate(METHODS, step["baseline_loader"], dataset, evaluation(**frame), settings)


@load_and_evaluate_baselines.command("baseline_loader", short_help="The models: -p FOLDER [-p FOLDER ...]")
@click.option("-p", "--baseline_paths", "paths", multiple=True, required=True, help="Model folder; repeatable.")
def baseline_loader_step(paths: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Name the model folders; each says of which method it is."""
    return "baseline_loader", paths


load_and_evaluate_baselines.add_command(stored_dataset_step)
