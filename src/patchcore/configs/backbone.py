"""Configuration of a backbone, which all methods share."""

from __future__ import annotations

from dataclasses import dataclass

from patchcore.configs.checks import MAX_SEED, require_at_least, require_choice
from patchcore.errors import ConfigurationError

NORMALIZATIONS = ("imagenet", "backbone")


@dataclass(frozen=True)
class BackboneWeights:
    """Which weights a frozen network came out with.

    Attributes:
        name: Name in the table of backbones.
        sha256: Digest of the tensors that feature maps depend on, as loaded; see `load_backbone`.
    """

    name: str
    sha256: str


@dataclass(frozen=True)
class BackboneConfig:
    """A frozen feature extractor.

    Attributes:
        name: Name in the table of backbones, for example "wideresnet50".
        layers: Modules whose output is used; the first gives the patch grid.
        weights: "pretrained", "random" or the path of a state dict.
        normalization: "imagenet" (as the original, for every backbone) or "backbone" (its own mean and std).
        seed: Seed of random weights.
    """

    name: str
    layers: tuple[str, ...]
    weights: str = "pretrained"
    normalization: str = "imagenet"
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice("normalization", self.normalization, NORMALIZATIONS)
        require_at_least("seed of random weights", self.seed, 0, MAX_SEED)
        if not self.layers:
            raise ConfigurationError(
                f"backbone {self.name!r} has no layer: name at least one, such as -le layer2 (FastFlow: --layers)"
            )
        if len(set(self.layers)) < len(self.layers):
            raise ConfigurationError(f"a layer is named twice in {', '.join(self.layers)}: name each layer once")
