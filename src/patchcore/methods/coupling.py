"""What a coupling of a normalizing flow computes: its subnet, and the affine transformation, on matrices of features.

Inside a flow, features are matrices [C, N] of channels by positions, the positions of all images in one row. A half of
the channels is then one block of memory and a permutation copies whole rows; only the 3x3 convolutions want channels
last, and get them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

from patchcore.configs import FastFlowConfig


class CouplingNet(nn.Sequential):
    """Two convolutions that give scale and shift of one half of the channels from the other half.

    The last convolution begins at zero, so that a new flow only permutes: the first loss is that of standard normal
    features, at any depth (Kingma & Dhariwal, "Glow", NeurIPS 2018, section 3.3).

    Args:
        channels_in: Channels of the half that is read.
        channels_out: Twice the channels of the half that is changed.
        kernel: Side of both convolutions, 3 or 1.
        config: Hidden channels and precision.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, config: FastFlowConfig) -> None:
        hidden = max(1, round(config.hidden_ratio * channels_in))
        super().__init__(
            nn.Conv2d(channels_in, hidden, kernel, padding="same"),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels_out, kernel, padding="same"),
        )
        last = self[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.in_bfloat16 = config.precision == "bfloat16"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, channels_out, H, W] of the type of `x`: only what lies within is of lower precision."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.in_bfloat16):
            coefficients = super().forward(x)
        return coefficients.to(x.dtype)

    def affine(
        self, x: torch.Tensor, grid: tuple[int, int, int], gain: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        """Return `gain` times the coefficients plus `bias`, computed with weights that contain both.

        Args:
            x: [channels_in, B * H * W].
            grid: B, H, W.
            gain: [channels_out].
            bias: [channels_out].

        Returns:
            [channels_out, B * H * W], of the type of `x`.
        """
        dtype = torch.bfloat16 if self.in_bfloat16 else x.dtype
        w1, b1, w2, b2 = (weight.to(dtype) for weight in self.weights(gain, bias))
        if w1.shape[2] == 1:
            hidden = torch.addmm(b1[:, None], w1.flatten(1), x.to(dtype)).relu_()  # [hidden, N]
            return torch.addmm(b2[:, None], w2.flatten(1), hidden).to(x.dtype)
        hidden_maps = F.conv2d(_ToMaps.apply(x.to(dtype), grid), w1, b1, padding="same").relu_()
        coefficients: torch.Tensor = _ToRows.apply(F.conv2d(hidden_maps, w2, b2, padding="same"))
        return coefficients.to(x.dtype)

    def affine_(
        self,
        x: torch.Tensor,
        grid: tuple[int, int, int],
        gain: torch.Tensor,
        bias: torch.Tensor,
        hidden: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Write what `affine` returns into `out`, without gradients.

        A row of ones makes the biases columns of the weights, so that matrices need no pass for them; and memory that
        is asked for anew in every step costs more than some of the arithmetic on it.

        Args:
            x: [channels_in + 1, B * H * W], the last row one.
            grid: B, H, W.
            gain: [channels_out].
            bias: [channels_out].
            hidden: [hidden channels + 1, B * H * W], the last row one; the others are overwritten.
            out: [channels_out, B * H * W].
        """
        w1, b1, w2, b2 = self.weights(gain, bias)
        if self.in_bfloat16:
            out.copy_(self.affine(x[:-1], grid, gain, bias))
            return
        if w1.shape[2] > 1:
            hidden_maps = F.conv2d(_maps(x[:-1], grid), w1, b1, padding="same").relu_()
            out.copy_(_as_rows_view(F.conv2d(hidden_maps, w2, b2, padding="same")))
            return
        torch.mm(torch.cat((w1.flatten(1), b1[:, None]), dim=1), x, out=hidden[:-1]).relu_()
        torch.mm(torch.cat((w2.flatten(1), b2[:, None]), dim=1), hidden, out=out)

    def weights(
        self, gain: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return weight and bias of both convolutions, the last ones with `gain` and `bias` in them."""
        first, _, last = self
        assert isinstance(first, nn.Conv2d) and isinstance(last, nn.Conv2d)
        assert first.bias is not None and last.bias is not None
        return first.weight, first.bias, last.weight * gain[:, None, None, None], last.bias * gain + bias


class _ToMaps(torch.autograd.Function):
    """A matrix [C, B * H * W] as feature maps [B, C, H, W], channels last; autograd alone gives strided gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        return _maps(x, grid)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return as_rows(gradients[0]), None


class _ToRows(torch.autograd.Function):
    """Feature maps [B, C, H, W] as a matrix [C, B * H * W]."""

    @staticmethod
    def forward(ctx: Any, maps: torch.Tensor) -> torch.Tensor:
        ctx.grid = maps.shape[0], maps.shape[2], maps.shape[3]
        return as_rows(maps)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return _maps(gradients[0], ctx.grid)


# Each direction in the form that torch copies fastest.


def _maps(rows: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    return rows.unflatten(1, grid).transpose(0, 1).contiguous(memory_format=torch.channels_last)


def as_rows(maps: torch.Tensor) -> torch.Tensor:
    return _as_rows_view(maps).contiguous()


def _as_rows_view(maps: torch.Tensor) -> torch.Tensor:
    if maps.is_contiguous(memory_format=torch.channels_last):
        return maps.permute(0, 2, 3, 1).flatten(0, 2).t()
    return maps.transpose(0, 1).flatten(1)


class Couple(torch.autograd.Function):
    """Affine coupling, global scale and offset, and permutation, with as few passes over memory as there can be.

    With (s, t) the coefficients of the changed half, the rows of the result are, before the permutation,
    passive * scale + offset and active * exp(clamp * tanh(s) + log_scale) + t.
    """

    @staticmethod
    def forward(
        ctx: Any,
        passive: torch.Tensor,
        active: torch.Tensor,
        coefficients: torch.Tensor,
        scale: torch.Tensor,
        offset: torch.Tensor,
        log_scale: torch.Tensor,
        order: torch.Tensor,
        clamp: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the result [C, N] and the sum of clamp * tanh(s) over channels [N].

        Args:
            ctx: What the backward pass needs.
            passive: [P, N], read by the subnet.
            active: [A, N], changed.
            coefficients: [2 A, N], s and t.
            scale: [P, 1].
            offset: [P, 1].
            log_scale: [A, 1].
            order: int64 [C], the row of the unpermuted result that each row is.
            clamp: Bound of the coupling's log-scale.
        """
        tanh = coefficients[: len(active)].tanh()
        factor = torch.add(log_scale, tanh, alpha=clamp).exp_()
        rows = passive.new_empty(len(order), passive.shape[1])
        torch.addcmul(offset, passive, scale, out=rows[: len(passive)])
        torch.addcmul(coefficients[len(active) :], active, factor, out=rows[len(passive) :])
        ctx.save_for_backward(passive, active, tanh, factor, scale, order)
        ctx.clamp = clamp
        return rows.index_select(0, order), tanh.sum(dim=0).mul_(clamp)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        passive, active, tanh, factor, scale, order = ctx.saved_tensors
        of_result, of_log_det = gradients
        of_passive, of_active = of_result.index_select(0, order.argsort()).tensor_split([len(passive)])
        of_coefficients = of_active.new_empty(2 * len(active), active.shape[1])
        of_coefficients[len(active) :] = of_active
        of_offset = of_passive.sum(dim=1, keepdim=True)
        of_scale = torch.linalg.vecdot(of_passive, passive)[:, None]
        of_active.mul_(factor)
        of_log_factor = of_active * active
        of_log_scale = of_log_factor.sum(dim=1, keepdim=True)
        of_tanh = of_log_factor.add_(of_log_det).mul_(ctx.clamp)
        torch.addcmul(of_tanh, of_tanh * tanh, tanh, value=-1, out=of_coefficients[: len(active)])
        return of_passive.mul_(scale), of_active, of_coefficients, of_scale, of_offset, of_log_scale, None, None


def couple_(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    log_scale: torch.Tensor,
    clamp: float,
    out: torch.Tensor,
) -> None:
    """Write what `Couple` returns before the permutation into `out`; no gradients, no log-determinant, no new memory.

    Args:
        x: [P + 1 + A, N]: passive rows, a row of ones, active rows.
        coefficients: [2 A, N]; overwritten.
        scale: [P, 1].
        offset: [P, 1].
        log_scale: [A, 1].
        clamp: Bound of the coupling's log-scale.
        out: As `x`; its row of ones is left alone.
    """
    num_passive = len(scale)
    factor, shift = coefficients.tensor_split([len(log_scale)])
    torch.add(log_scale, factor.tanh_(), alpha=clamp, out=factor).exp_()
    torch.addcmul(offset, x[:num_passive], scale, out=out[:num_passive])
    torch.addcmul(shift, x[num_passive + 1 :], factor, out=out[num_passive + 1 :])
