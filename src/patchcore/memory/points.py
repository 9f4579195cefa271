"""The points that a sampler chooses from: features, or their projection, read in blocks and never copied whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from patchcore.errors import DataError

PROJECTION_DIM = 128  # as in the original repository
CHUNK_ELEMENTS = 2**18  # numbers worked on at once: temporaries of about 1 MB for any number of points


@dataclass(frozen=True)
class Points:
    """Some rows of a matrix, less a vector.

    Attributes:
        matrix: [N, R] float32.
        centre: [R], what is subtracted from each row; None for nothing.
        rows: [K] int64, the rows that are points; None for all.
    """

    matrix: torch.Tensor
    centre: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.matrix) if self.rows is None else len(self.rows)

    def __getitem__(self, index: slice | torch.Tensor) -> torch.Tensor:
        """Return the points [k, R] of a slice or of numbers [k]; a copy unless all rows are points as they are."""
        numbers = index if self.rows is None else self.rows[index]
        # index_select gathers rows in a third of the time of an index in brackets.
        points = self.matrix[numbers] if isinstance(numbers, slice) else self.matrix.index_select(0, numbers)
        return points if self.centre is None else points - self.centre

    def subset(self, numbers: torch.Tensor) -> Points:
        """Return the points of these numbers [K] int64."""
        return replace(self, rows=numbers if self.rows is None else self.rows[numbers])

    @property
    def dim(self) -> int:
        return self.matrix.shape[1]

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def chunks(self, row_elements: int) -> Iterator[slice]:
        """Yield slices that cover all points, short enough for temporaries of `row_elements` numbers a point."""
        return row_chunks(len(self), row_elements)


def row_chunks(num_rows: int, row_elements: int) -> Iterator[slice]:
    """Yield slices that cover all rows, short enough for temporaries of `row_elements` numbers a row."""
    rows_per_chunk = max(1, CHUNK_ELEMENTS // row_elements)
    for start in range(0, num_rows, rows_per_chunk):
        yield slice(start, min(start + rows_per_chunk, num_rows))


@torch.no_grad()
def project_features(features: torch.Tensor, generator: torch.Generator, out: torch.Tensor | None = None) -> Points:
    """Centre the features and project them at random to at most 128 dimensions.

    Source: the original repository, a bias-free linear layer as torch initialises it, uniform in
    +-1/sqrt(D). Two departures. It projects whenever D is not 128; we do so only where that reduces the
    dimension, since a projection upwards costs time and distorts distances. And it does not centre; distances
    do not change by it, but float32 keeps more of their digits.

    Args:
        features: [N, D] float32.
        generator: Draws the projection, on the CPU.
        out: [N, 128] float32, where the projection goes; None for a new one.

    Returns:
        Points [N, min(D, 128)] on the device of `features`; up to 128 dimensions they read the features themselves.

    Raises:
        DataError: Features are infinite or not a number.
    """
    num_points, dim = features.shape
    centre = _column_means(features)
    if dim <= PROJECTION_DIM:
        return Points(features.detach(), centre)
    bound = 1 / math.sqrt(dim)
    projection = torch.empty(PROJECTION_DIM, dim).uniform_(-bound, bound, generator=generator)
    projection = projection.T.to(features.device)  # [D, 128]
    projected = out if out is not None else features.new_empty((num_points, PROJECTION_DIM), dtype=torch.float32)
    for rows in row_chunks(num_points, dim):
        torch.mm(features[rows].float() - centre, projection, out=projected[rows])  # [rows, 128]
    return Points(projected)


def _column_means(features: torch.Tensor) -> torch.Tensor:
    """Return the mean [D] float32 of features [N, D], accumulated over chunks in float64.

    A feature that is not finite makes its column's sum so, which spares a pass that looks for it.
    """
    total = torch.zeros(features.shape[1], dtype=torch.float64)
    for rows in row_chunks(*features.shape):
        total += features[rows].float().sum(dim=0).cpu().double()
    if not bool(total.isfinite().all()):
        check_finite(features)
        raise overflow()
    return (total / len(features)).float().to(features.device)


def check_finite(features: torch.Tensor) -> None:
    """Raise DataError where a feature is infinite or not a number."""
    for rows in row_chunks(*features.shape):
        extremes = torch.stack(features[rows].aminmax())  # one pass; a NaN anywhere becomes both extremes
        if not bool(extremes.isfinite().all()):
            raise DataError(
                "found infinite or NaN features, expected finite numbers: check the weights of the backbone "
                "and the training images"
            )


def squared_norms(points: Points) -> torch.Tensor:
    """Return the squared norm [N] of each point, refusing those that float32 cannot hold."""
    norms = torch.empty(len(points), device=points.device)
    for rows in points.chunks(points.dim):
        norms[rows] = points[rows].square().sum(dim=1)
    if not math.isfinite(float(norms.max()) * 4):  # |x - y|^2 <= 2 |x|^2 + 2 |y|^2
        raise overflow()
    return norms


def overflow() -> DataError:
    return DataError("features overflow float32 when squared, expected values below 1e18: check the backbone")
