"""The last phase of the Triton kernel: plain augmenting paths, one row after another, for what the forests left."""

# Triton's language is not Python's types.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from detr_kd_losses.assignment._quantize import FORBIDDEN, INF

__all__: list[str] = []

FORBIDDEN_64 = tl.constexpr(1 << 40)  # F: costs more than any set of 2^13 finite entries
INF_64 = tl.constexpr(1 << 60)


@triton.jit
def augment_one_by_one(
    q, width, price, owner, free_rows, num_free, num_columns, owners, new_owners, parents, lanes, BLOCK: tl.constexpr
):
    """Dijkstra's shortest path in int64 for every row in `free_rows`; return the owners."""
    potential = price.to(tl.int64)
    k = 0
    while k < num_free:
        root = tl.load(free_rows + k)
        row = root
        parent_id = ~root
        offset = tl.full((), 0, tl.int64)
        label = tl.full((BLOCK,), INF_64, tl.int64)
        parent = tl.full((BLOCK,), 0, tl.int32)
        closed = lanes >= num_columns
        end = -1
        distance = offset
        while row >= 0:
            entry = tl.load(q + row * width + lanes, mask=lanes < width, other=INF).to(tl.int64)
            reduced = tl.where(entry == FORBIDDEN, FORBIDDEN_64, entry) - potential
            nearer = (reduced + offset < label) & ~closed
            label = tl.where(nearer, reduced + offset, label)
            parent = tl.where(nearer, parent_id, parent)
            closed = closed | (owner == row)  # all columns of the slack row at once: the first speaks for them
            key = tl.where(closed, 2 * INF_64, 2 * label + (owner >= 0).to(tl.int64))  # unmatched ones first
            least, end = tl.min(key, axis=0, return_indices=True)
            distance = least >> 1
            row = tl.max(tl.where(lanes == end, owner, -1), axis=0)
            entry_end = tl.load(q + row * width + end, mask=row >= 0, other=0).to(tl.int64)
            price_end = tl.sum(tl.where(lanes == end, potential, 0), axis=0)
            offset = distance - (tl.where(entry_end == FORBIDDEN, FORBIDDEN_64, entry_end) - price_end)
            parent_id = end
        potential += tl.where(closed & (lanes < num_columns), label - distance, 0)
        tl.store(parents + lanes, parent)
        tl.store(owners + lanes, owner)
        tl.store(new_owners + lanes, owner)
        tl.debug_barrier()  # parents, owners, new_owners: written above; parents and owners are only read below
        up = tl.load(parents + end)
        while up >= 0:
            tl.store(new_owners + end, tl.load(owners + up))
            end = up
            up = tl.load(parents + end)
        tl.store(new_owners + end, ~up)
        tl.debug_barrier()  # new_owners: written above, read below; parents, owners: read above, next time written
        owner = tl.load(new_owners + lanes)
        tl.debug_barrier()  # new_owners: read above, next time written
        k += 1
    return owner
