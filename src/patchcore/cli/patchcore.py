"""The commands `run_patchcore` and `load_and_evaluate_patchcore`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click

from patchcore.cli.backbones import typed_backbones
from patchcore.cli.byte_size import ByteSize
from patchcore.cli.commands import (
    SKIP_EXISTING_OPTION,
    STORED_OPTIONS,
    evaluate,
    evaluation,
    prepare_console,
    run_config,
    run_options,
    train,
)
from patchcore.cli.grammar import ChainedCommand
from patchcore.cli.steps import PRECISION_OPTION, dataset_step, refuse, sampler_step, stored_dataset_step, with_options
from patchcore.configs import (
    EMBEDDINGS,
    INDEXES,
    NORMALIZATIONS,
    PATCH_SCORES,
    RAY,
    SCORE_NORMALIZATIONS,
    DatasetConfig,
    EnsembleConfig,
    PatchCoreConfig,
    RunConfig,
    SamplerConfig,
    ShardsConfig,
    ThresholdRule,
)
from patchcore.configs.typed import TypedSetting

LOGGER = logging.getLogger(__name__)


@click.group("run_patchcore", cls=ChainedCommand, required_steps=("patch_core", "sampler", "dataset"))
@click.argument("results_path")
@with_options(
    *run_options(
        click.option("--save_patchcore_model", "save_model", is_flag=True, help="One model folder per class."),
        SKIP_EXISTING_OPTION,
    ),
    click.option(
        "--shards",
        type=int,
        default=None,
        help="With --launcher ray: choose the bank from so many shares of the images, each read by one task.",
    ),
    click.option(
        "--shard_coreset",
        type=int,
        default=None,
        help="Patches that each share keeps; as many as the bank has in the end if left out.",
    ),
)
def run_patchcore(**options: Any) -> None:
    """Train PatchCore on good images and evaluate it: RESULTS_PATH, then the steps patch_core, sampler, dataset.

    Tables, scores and pictures go to RESULTS_PATH/LOG_PROJECT/LOG_GROUP, or LOG_GROUP_0, _1, ... if that exists.
    """


@run_patchcore.result_callback()
def _run(steps: list[tuple[str, Any]], shards: int | None, shard_coreset: int | None, **frame: Any) -> int:
    step = dict(steps)
    members, score_normalization, machine = step["patch_core"]
    dataset: DatasetConfig = step["dataset"]
    run = run_config(**frame)
    sampler = replace(step["sampler"], shards=_shards(shards, shard_coreset, run, members))
    method, config = _method(members, sampler, score_normalization)
    run = replace(run, runtime=replace(run.runtime, **machine))
    _require_seeds_that_differ(run.seeds, members, dataset)
    _require_images_for_fusion(config, dataset)
    if score_normalization == "minmax":
        reason = "minmax scales scores over the test images, which leaves no threshold"
        refuse("--threshold_rule", str(run.threshold_rule), str(ThresholdRule()), reason)
    prepare_console()
    if score_normalization == "minmax" and run.calibration != "none":
        LOGGER.warning("minmax scales scores over the test images, which leaves no threshold: decisions stay blank")
    return train(method, lambda _: config, run, dataset)


def _shards(
    count: int | None, coreset: int | None, run: RunConfig, members: Sequence[PatchCoreConfig]
) -> ShardsConfig | None:
    """Return in which shares a bank is chosen, refusing what does not go with them."""
    if count is None:
        if coreset is not None:
            raise click.UsageError(f"--shard_coreset {coreset} without --shards: type both, or neither")
        return None
    if run.launch.launcher != RAY:
        raise click.UsageError(f"--shards {count} without --launcher ray, whose tasks read them: type both, or neither")
    if len(members) > 1:
        raise click.UsageError(f"--shards {count} with an ensemble of {len(members)}: name one -b, or leave it out")
    return ShardsConfig(count, coreset)


def _require_seeds_that_differ(
    seeds: Sequence[int], members: Sequence[PatchCoreConfig], dataset: DatasetConfig
) -> None:
    """Refuse several --seed where none of them decides anything."""
    decided_elsewhere = all(member.seed is not None for member in members)
    if len(seeds) > 1 and decided_elsewhere and dataset.limit_train is None and dataset.train_val_split == 1:
        raise click.UsageError(
            f"{len(seeds)} --seed, but every -b has a .seed-N in their place, so that all would give the same model: "
            "leave .seed-N out or name one --seed"
        )


def _require_images_for_fusion(config: PatchCoreConfig | EnsembleConfig, dataset: DatasetConfig) -> None:
    """Refuse an ensemble whose members would have a single image to learn their scale from."""
    needs_scale = isinstance(config, EnsembleConfig) and config.score_normalization == "calibrated"
    if needs_scale and dataset.limit_train == 1:
        raise click.UsageError(
            "--limit_train 1 does not tell the scale of an ensemble's members, expected 2 or more: give more images, "
            "or --score_normalization minmax"
        )


def _method(
    members: Sequence[PatchCoreConfig], sampler: SamplerConfig, score_normalization: str | None
) -> tuple[str, PatchCoreConfig | EnsembleConfig]:
    """Return name and configuration of the method: PatchCore, or an ensemble of several."""
    configs = tuple(replace(member, sampler=sampler) for member in members)
    if len(configs) > 1:
        return "ensemble", EnsembleConfig(configs, score_normalization or "calibrated")
    if score_normalization is not None:
        raise click.UsageError(
            f"--score_normalization {score_normalization} joins the members of an ensemble, found one backbone: "
            "leave it out or name several -b"
        )
    return "patchcore", configs[0]


MACHINE_OPTIONS = (
    click.option("--faiss_on_gpu", is_flag=True, help="Search on the GPU where faiss was built for it."),
    click.option(
        "--faiss_num_workers", type=int, default=None, help="Search with faiss on so many CPU threads instead of torch."
    ),
    PRECISION_OPTION,
)


@run_patchcore.command("patch_core", short_help="The method: -b BACKBONE -le LAYER [-le LAYER ...] [OPTIONS]")
@with_options(
    click.option(
        "-b", "--backbone_names", "backbones", multiple=True, help="Backbone (see the README); several: an ensemble."
    ),
    click.option(
        "-le", "--layers_to_extract_from", "layers", multiple=True, help="Layer; i.LAYER for backbone i of several."
    ),
    click.option("--pretrain_embed_dimension", type=int, default=1024, show_default=True, help="Values per layer."),
    click.option("--target_embed_dimension", type=int, default=1024, show_default=True, help="Values per patch."),
    click.option("--preprocessing", default="mean", show_default=True, help="Only mean, as in the original."),
    click.option("--aggregation", default="mean", show_default=True, help="Only mean, as in the original."),
    click.option("--anomaly_scorer_num_nn", "num_nn", type=int, default=5, show_default=True, help="Neighbours, k."),
    click.option("--patchsize", type=int, default=3, show_default=True, help="Side of the neighbourhood, odd."),
    click.option(
        "--patchscore",
        type=click.Choice(PATCH_SCORES),
        default="max",
        show_default=True,
        help="Image score: highest patch score, mean of all, or mean of the highest percent.",
    ),
    click.option("--patchoverlap", type=float, default=0.0, show_default=True, help="Only 0: patches are dense."),
    click.option(
        "-pa", "--patchsize_aggregate", type=int, multiple=True, help="Further neighbourhood size, odd; repeatable."
    ),
    *MACHINE_OPTIONS,
    click.option(
        "--memory_budget",
        "memory_budget_bytes",
        type=ByteSize(),
        default=None,
        help="Training features above it, such as 1GB, lie in files in the run folder; slower, same results.",
    ),
    click.option(
        "--weights", multiple=True, help="pretrained (default), random or a path; one for all -b or one each."
    ),
    click.option("--embedding", type=click.Choice(EMBEDDINGS), default="pooled", show_default=True, help="Embedding."),
    click.option(
        "--normalization",
        type=click.Choice(NORMALIZATIONS),
        default="imagenet",
        show_default=True,
        help="Mean and std of images: ImageNet's for all, or the backbone's own.",
    ),
    click.option(
        "--score_reweighting", type=int, default=None, help="Re-weight image scores by so many neighbours (Eq. 7)."
    ),
    click.option(
        "--score_normalization",
        type=click.Choice(SCORE_NORMALIZATIONS),
        default=None,
        help="Scale of an ensemble's members: normal images (calibrated, default) or the test set (minmax).",
    ),
    click.option(
        "--index",
        type=click.Choice(INDEXES),
        default="flat",
        show_default=True,
        help="Search: exact (flat), faster (projected, ivf), in a bank of fewer bytes (fp16, sq8, ivfpq).",
    ),
)
def patch_core_step(
    backbones: tuple[str, ...],
    layers: tuple[str, ...],
    pretrain_embed_dimension: int,
    target_embed_dimension: int,
    preprocessing: str,
    aggregation: str,
    num_nn: int,
    patchsize: int,
    patchscore: str,
    patchoverlap: float,
    patchsize_aggregate: tuple[int, ...],
    faiss_on_gpu: bool,
    faiss_num_workers: int | None,
    precision: str,
    memory_budget_bytes: int | None,
    weights: tuple[str, ...],
    embedding: str,
    normalization: str,
    score_reweighting: int | None,
    score_normalization: str | None,
    index: str,
) -> tuple[str, tuple[tuple[PatchCoreConfig, ...], str | None, dict[str, Any]]]:
    """PatchCore: backbone, layers, embedding, neighbours. Several backbones give an ensemble."""
    refuse("--preprocessing", preprocessing, "mean", "the original pools by mean whatever is typed")
    refuse("--aggregation", aggregation, "mean", "the original pools by mean whatever is typed")
    refuse("--patchoverlap", patchoverlap, 0.0, "there is a patch at every place, so that overlap is not a choice")
    members = tuple(
        PatchCoreConfig(
            backbone=backbone,
            embedding=embedding,
            pretrain_embed_dimension=pretrain_embed_dimension,
            target_embed_dimension=target_embed_dimension,
            patchsize=patchsize,
            num_nn=num_nn,
            patchsize_aggregate=patchsize_aggregate,
            patchscore=patchscore,
            score_reweighting=score_reweighting,
            seed=seed,
            index=index,
        )
        for backbone, seed in typed_backbones(backbones, layers, weights, normalization)
    )
    machine = {
        "faiss_on_gpu": faiss_on_gpu,
        "faiss_num_workers": faiss_num_workers,
        "precision": precision,
        "memory_budget_bytes": memory_budget_bytes,
    }
    return "patch_core", (members, score_normalization, machine)


@click.group("load_and_evaluate_patchcore", cls=ChainedCommand, required_steps=("patch_core_loader", "dataset"))
@click.argument("save_folder")
@with_options(*STORED_OPTIONS)
def load_and_evaluate_patchcore(**options: Any) -> None:
    """Evaluate stored models: SAVE_FOLDER, then the steps patch_core_loader and dataset."""


@load_and_evaluate_patchcore.result_callback()
def _load_and_evaluate(steps: list[tuple[str, Any]], **frame: Any) -> int:
    step = dict(steps)
    paths, machine, index = step["patch_core_loader"]
    dataset, typed = step["dataset"]
    place = evaluation(**frame)
    place = replace(place, runtime=replace(place.runtime, **machine))
    overrides = [TypedSetting("--index", ("config", "index"), index)] if index is not None else []
    return evaluate(("patchcore", "ensemble"), paths, dataset, place, typed, overrides)


@load_and_evaluate_patchcore.command("patch_core_loader", short_help="The models: -p FOLDER [-p FOLDER ...]")
@with_options(
    click.option("-p", "--patch_core_paths", "paths", multiple=True, required=True, help="Model folder; repeatable."),
    *MACHINE_OPTIONS,
    click.option(
        "--index",
        type=click.Choice(INDEXES),
        default=None,
        help="Search the stored memory bank so, if its values are float32; default: as it was trained.",
    ),
)
def patch_core_loader_step(
    paths: tuple[str, ...], faiss_on_gpu: bool, faiss_num_workers: int | None, precision: str, index: str | None
) -> tuple[str, tuple[tuple[str, ...], dict[str, Any], str | None]]:
    """Name the model folders."""
    machine = {"faiss_on_gpu": faiss_on_gpu, "faiss_num_workers": faiss_num_workers, "precision": precision}
    return "patch_core_loader", (paths, machine, index)


run_patchcore.add_command(sampler_step)
run_patchcore.add_command(dataset_step)
load_and_evaluate_patchcore.add_command(stored_dataset_step)
