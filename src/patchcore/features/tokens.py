"""Token models (ViT, DeiT, Swin, DINOv2): the names of their blocks, the image sizes they take, tokens to maps."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patchcore.errors import ConfigurationError


def block_aliases(network: nn.Module) -> dict[str, str]:
    """Number the blocks of a network that keeps them in stages, as Swin does: blocks are counted through the stages.

    Returns:
        {"blocks.N": name as in `named_modules`}; empty where the network itself has a module `blocks`.
    """
    if hasattr(network, "blocks"):
        return {}
    names = [name for name, _ in network.named_modules() if re.fullmatch(r"\w+\.\d+\.blocks\.\d+", name)]
    return {f"blocks.{number}": name for number, name in enumerate(names)}


def require_imagesize(backbone: str, network: nn.Module, imagesize: int) -> None:
    """Refuse an image that patches do not fill.

    Some networks take such an image all the same and leave a margin out; their grid would then not be that of the
    image. Networks without a patch embedding (the part that timm gives a `feat_ratio`) pass.

    Raises:
        ConfigurationError: The side is no multiple of the patch size.
    """
    ratios = [getattr(part, "feat_ratio", None) for part in network.children()]
    patch_px = next((int(ratio()) for ratio in ratios if callable(ratio)), 1)
    if imagesize % patch_px:
        lower = imagesize // patch_px * patch_px
        sizes = " or ".join(str(size) for size in (lower, lower + patch_px) if size)
        raise ConfigurationError(
            f"backbone {backbone!r} cuts images into patches of {patch_px} px, and {imagesize} px is no multiple of "
            f"that: use --imagesize {sizes}"
        )


@dataclass(frozen=True)
class MapLayout:
    """Where a layer's output has its feature map.

    Attributes:
        order: "NCHW"; "NHWC"; or "NLC", tokens of a square grid, row by row.
        num_prefix_tokens: Class, distillation and register tokens in front of those of the grid; "NLC" only.
    """

    order: str
    num_prefix_tokens: int = 0

    def feature_map(self, output: torch.Tensor) -> torch.Tensor:
        """Return the feature map [B, C, H, W] of an output, without a copy."""
        if self.order == "NCHW":
            return output
        if self.order == "NLC":
            tokens = output[:, self.num_prefix_tokens :]  # [B, H * W, C]
            side = math.isqrt(tokens.shape[1])
            output = tokens.unflatten(1, (side, side))  # [B, H, W, C]
        return output.permute(0, 3, 1, 2)  # [B, C, H, W]


def map_layout(output: Any, network: nn.Module) -> MapLayout | None:
    """Find the layout of a layer's output.

    Args:
        output: What the layer gave for one square image.
        network: The whole network; timm's say how many prefix tokens they have and whether channels come last.

    Returns:
        The layout, or None where the output is no feature map.
    """
    if not isinstance(output, torch.Tensor) or output.shape[:1] != (1,):  # windows or heads stand in for the batch
        return None
    if output.ndim == 4:
        return MapLayout("NHWC" if _channels_last(output, network) else "NCHW")
    if output.ndim == 3 and not _in_windows(network):
        # In some networks the prefix joins the grid behind most of the blocks (CaiT, ConViT).
        for num_prefix_tokens in (getattr(network, "num_prefix_tokens", 0), 0):
            num_tokens = output.shape[1] - num_prefix_tokens
            if num_tokens > 0 and math.isqrt(num_tokens) ** 2 == num_tokens:
                return MapLayout("NLC", num_prefix_tokens)
    return None


def _channels_last(output: torch.Tensor, network: nn.Module) -> bool:
    """Tell [1, H, W, C] from [1, C, H, W], both of a square image."""
    _, first, second, third = output.shape
    if first == second == third:
        return str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")
    return first == second


def _in_windows(network: nn.Module) -> bool:
    """Tell whether a network orders its tokens by windows until its own `reroll` puts them back (Hiera)."""
    return hasattr(network, "reroll")
