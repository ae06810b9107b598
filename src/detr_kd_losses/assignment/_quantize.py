"""Triton functions that turn a problem's costs into integers, dense and without its invalid rows and columns."""

# Triton's language is not Python's types.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

__all__: list[str] = []

UNITS = tl.constexpr(1 << 26)  # the range of the finite entries
FORBIDDEN = tl.constexpr(1 << 27)  # a non-finite entry, where its row has a finite one
INF = tl.constexpr(1 << 30)  # no column: above every label, and INF + 3 FORBIDDEN is below 2^31


@triton.jit
def list_valid(mask, stride, size, indices, lanes):
    """Write the indices of the True entries of `mask` to `indices`; return how many there are."""
    valid = tl.load(mask + lanes.to(tl.int64) * stride, mask=lanes < size, other=0).to(tl.int32)
    tl.store(indices + tl.cumsum(valid, axis=0) - 1, lanes, mask=valid > 0)
    return tl.sum(valid, axis=0)


@triton.jit
def _load_costs(cost, stride_row, stride_column, row_ids, column_ids, start, num_rows, num_columns, lanes, tile):
    """Tile of the original costs from row `start` on, and which of them are finite."""
    row_valid = start + tile < num_rows
    column_valid = lanes < num_columns
    row = tl.load(row_ids + start + tile, mask=row_valid, other=0).to(tl.int64)
    column = tl.load(column_ids + lanes, mask=column_valid, other=0).to(tl.int64)
    value = tl.load(
        cost + row[:, None] * stride_row + column[None, :] * stride_column,
        mask=row_valid[:, None] & column_valid[None, :],
        other=float("inf"),
    )
    finite = tl.abs(value) < float("inf")
    return value, finite


@triton.jit
def quantize(cost, stride_row, stride_column, row_ids, column_ids, num_rows, num_columns, q, width, lanes, tile):
    """Write the costs as integers to `q`, (num_rows + 1, width); the last row is the slack row."""
    low = tl.full(lanes.shape, float("inf"), cost.dtype.element_ty)
    high = -low
    start = 0
    while start < num_rows:
        value, finite = _load_costs(
            cost, stride_row, stride_column, row_ids, column_ids, start, num_rows, num_columns, lanes, tile
        )
        low = tl.minimum(low, tl.min(tl.where(finite, value, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(finite, value, float("-inf")), axis=0))
        start += tile.shape[0]
    low = tl.min(low, axis=0).to(tl.float64)
    high = tl.max(high, axis=0).to(tl.float64)
    any_finite = low <= high
    low = tl.where(any_finite, low, 0.0)
    high = tl.where(any_finite, high, 0.0)
    # A power of two keeps the range of the largest float64 costs finite, and the scale of the smallest.
    size = tl.maximum(tl.abs(low), tl.abs(high))
    power = tl.where(size > 1e300, 0.25, tl.where(size < 1e-200, 2.0**600, 1.0))
    low *= power
    span = high * power - low
    scale = UNITS / tl.where(span > 0.0, span, 1.0)
    start = 0
    while start < num_rows:
        value, finite = _load_costs(
            cost, stride_row, stride_column, row_ids, column_ids, start, num_rows, num_columns, lanes, tile
        )
        value = tl.where(finite, value.to(tl.float64) * power, low)
        units = ((value - low) * scale + 0.5).to(tl.int32)
        # Every row is matched, so one without a finite entry is a constant: 0 says it as well.
        usable = tl.max(finite.to(tl.int32), axis=1) > 0
        units = tl.where(finite, units, tl.where(usable, FORBIDDEN, 0)[:, None])
        units = tl.where((lanes < num_columns)[None, :], units, INF)
        row = start + tile
        inside = (row < num_rows)[:, None] & (lanes < width)[None, :]
        tl.store(q + row[:, None] * width + lanes[None, :], units, mask=inside)
        start += tile.shape[0]
    tl.store(q + num_rows * width + lanes, tl.where(lanes < num_columns, 0, INF), mask=lanes < width)
