"""Configurations of PatchCore and its ensembles."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

from patchcore.configs.backbone import BackboneConfig
from patchcore.configs.checks import MAX_SEED, require_at_least, require_choice, require_fraction
from patchcore.errors import ConfigurationError

EMBEDDINGS = ("pooled", "concat")
PATCH_SCORES = ("max", "mean", "topk")
SCORE_NORMALIZATIONS = ("calibrated", "minmax")
MAX_SHARDS = 65536
INDEXES = ("flat", "projected", "fp16", "sq8", "ivf", "ivfpq")
GREEDY_SAMPLERS = ("greedy_coreset", "approx_greedy_coreset")


@dataclass(frozen=True)
class ShardsConfig:
    """A memory bank that is chosen in two rounds: from each share of the images, then from what those have kept.

    Attributes:
        count: Shares of the training images, >= 2.
        coreset: Patches that each share keeps; None for as many as the bank has in the end.
    """

    count: int
    coreset: int | None = None

    def __post_init__(self) -> None:
        require_at_least("--shards", self.count, 2, MAX_SHARDS)
        if self.coreset is not None:
            require_at_least("--shard_coreset", self.coreset, 1)


@dataclass(frozen=True)
class SamplerConfig:
    """How the memory bank is chosen from all training patches.

    Attributes:
        name: Name in the registry of samplers, for example "approx_greedy_coreset".
        percentage: Share of the patches that is kept, in (0, 1].
        shards: How it is chosen by several processes; None where one sees all patches.
    """

    name: str = "approx_greedy_coreset"
    percentage: float = 0.1
    shards: ShardsConfig | None = None

    def __post_init__(self) -> None:
        require_fraction("sampler --percentage", self.percentage)
        if self.shards is not None and self.name not in GREEDY_SAMPLERS:
            raise ConfigurationError(
                f"--shards {self.shards.count} chooses a coreset in two rounds, found sampler {self.name!r}: use "
                f"{' or '.join(GREEDY_SAMPLERS)}, or leave --shards out"
            )


@dataclass(frozen=True)
class PatchCoreConfig:
    """PatchCore (Roth et al., CVPR 2022), one backbone.

    Attributes:
        backbone: Feature extractor and layers.
        sampler: How the memory bank is chosen.
        embedding: "pooled" (the published one) or "concat" (neighbourhood means, concatenated).
        pretrain_embed_dimension: Channels per layer after the first pooling; "pooled" only.
        target_embed_dimension: Channels of a patch embedding; "pooled" only.
        patchsize: Side of the neighbourhood, odd.
        num_nn: Neighbours whose distances are averaged, k.
        patchsize_aggregate: Sides of further neighbourhoods, odd; the embedding holds all sizes.
        patchscore: What of an image's patch scores is its score: one of PATCH_SCORES.
        score_reweighting: Bank members around the nearest one whose distances re-weight the image score (Eq. 7 of the
            paper), >= 2; None leaves the score as it is.
        seed: Seed of this model's coreset in place of the run's; None takes the run's.
        index: How the bank is kept and searched: one of INDEXES.
    """

    backbone: BackboneConfig
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    embedding: str = "pooled"
    pretrain_embed_dimension: int = 1024
    target_embed_dimension: int = 1024
    patchsize: int = 3
    num_nn: int = 5
    patchsize_aggregate: tuple[int, ...] = ()
    patchscore: str = "max"
    score_reweighting: int | None = None
    seed: int | None = None
    index: str = "flat"

    @property
    def patchsizes(self) -> tuple[int, ...]:
        """All sides of neighbourhoods."""
        return (self.patchsize, *self.patchsize_aggregate)

    def __post_init__(self) -> None:
        require_choice("embedding", self.embedding, EMBEDDINGS)
        require_choice("--patchscore", self.patchscore, PATCH_SCORES)
        require_choice("--index", self.index, INDEXES)
        require_at_least("--pretrain_embed_dimension", self.pretrain_embed_dimension, 1, 65536)
        require_at_least("--target_embed_dimension", self.target_embed_dimension, 1, 65536)
        require_at_least("--anomaly_scorer_num_nn", self.num_nn, 1)
        self._require_patchsizes()
        if self.score_reweighting is not None:
            require_at_least("--score_reweighting", self.score_reweighting, 2)
            if self.patchscore != "max":
                raise ConfigurationError(
                    f"--score_reweighting weighs the highest patch score, --patchscore {self.patchscore} has no such "
                    "one: leave one of the two out"
                )
        if self.seed is not None:
            require_at_least("seed of a backbone", self.seed, 0, MAX_SEED)
        dimensions = (self.pretrain_embed_dimension, self.target_embed_dimension)
        if self.embedding == "concat" and dimensions != (1024, 1024):
            raise ConfigurationError(
                f"--embedding concat keeps every channel, but dimensions {dimensions[0]} and {dimensions[1]} were "
                "asked for: leave --pretrain_embed_dimension and --target_embed_dimension out, or use pooled"
            )

    def _require_patchsizes(self) -> None:
        further = [("--patchsize_aggregate", size) for size in self.patchsize_aggregate]
        for name, size in [("--patchsize", self.patchsize), *further]:
            require_at_least(name, size, 1, 99)
            if size % 2 == 0:
                raise ConfigurationError(f"{name} is {size}, expected an odd number so that it has a centre")
        if len(set(self.patchsizes)) < len(self.patchsizes):
            raise ConfigurationError(f"patch sizes {self.patchsizes}: one is named twice, name each once")


def _same_model(one: PatchCoreConfig, other: PatchCoreConfig) -> bool:
    """Return whether two members come out alike: no random choice, or the same one, tells them apart."""
    if replace(one, seed=None) != replace(other, seed=None):
        return False
    return one.sampler.name == "identity" or (one.seed is not None and one.seed == other.seed)


@dataclass(frozen=True)
class EnsembleConfig:
    """Several PatchCore models whose scores are averaged.

    Attributes:
        members: The models, two or more.
        score_normalization: How members come to one scale: "calibrated" by normal images, "minmax" over the test
            images that are scored together, as the original does.
    """

    members: tuple[PatchCoreConfig, ...]
    score_normalization: str = "calibrated"

    def __post_init__(self) -> None:
        require_choice("--score_normalization", self.score_normalization, SCORE_NORMALIZATIONS)
        if len(self.members) < 2:
            raise ConfigurationError(
                f"an ensemble of {len(self.members)} member(s), expected two or more: name each -b"
            )
        for (first, one), (second, other) in itertools.combinations(enumerate(self.members), 2):
            if _same_model(one, other):
                raise ConfigurationError(
                    f"members {first} and {second} of the ensemble would be the same model: give one of them another "
                    "backbone, other layers or, with a random or coreset sampler, another .seed-N"
                )
