"""The Triton kernel: one program per assignment problem, exact in integers, without synchronising with the host.

Every problem is made square and dense. The smaller side gives the rows (by strides), and one *slack row* of zero cost
owns every column that is left over, as often as needed. Entries become integers q in [0, 2^26] over the range of the
finite ones, and non-finite ones K = 2^27 for now (`_quantize.py`). With column prices v and u_i = min_j (q_ij - v_j):

1. `_auction`: all free rows bid at once, for some rounds. Cheap, and it matches most rows.
2. `_grow_forest`: shortest paths from all free rows at once, STEP rows relaxed per step, labels corrected until none
   improves; `_augment` matches one path per root. Full price updates make this many paths per phase.
3. `augment_one_by_one`: plain shortest augmenting paths in int64, for what is left: rows that were given a non-finite
   entry (which now costs F = 2^40, more than all finite ones together), or all free rows if the forest ran out of
   steps. Each step of a path closes a column, so it always ends.

Why this is exact: after 1, 2 and 3 every pair is tight (q_ij = u_i + v_j) and no entry is below u_i + v_j, which proves
an optimum of a square problem; raising entries from K to F keeps both for pairs of finite cost. Rounding moves an entry
by half a unit at most, so it moves the difference of two matchings of n pairs by n units: n 2^-26 of the range.

Why int32 is enough: v stays within [-K, 0], so that q - v and u lie in [0, 2K], as do the labels that a phase starts
with; labels only fall, and a relaxed one is at most 4K = 2^29 before it is compared.
In the auction unmatched columns have v = 0. A row that bids for j sees another unmatched one, hence u_i <= K afterwards
and v_j = q_ij - u_i >= -K, unless j itself is the last: there the bid is cut at K. In the forest max v is moved to 0
before each phase, and max v - min v <= K: a column j matched to row i has v_k - v_j <= q_ik - q_ij <= K for all k, and
so has an unmatched one, with the row that the last phase made it tight with (before the first phase it has v = 0).
In int64, labels are at most n F <= 2^52.

Why it is free of races: programs share no scratch. Within a program, between two barriers no address of the scratch
is both read and written, nor written by two lanes (tested); a comment at each barrier says what it hands over.
"""

# Triton's language is not Python's types.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from detr_kd_losses.assignment._one_by_one import augment_one_by_one
from detr_kd_losses.assignment._quantize import FORBIDDEN, INF, list_valid, quantize

__all__: list[str] = []

AUCTION_ROUNDS = tl.constexpr(32)  # more of them no longer save forest steps


@triton.jit
def _list_free_rows(column_of_row, free_rows, num_rows, lanes):
    """Write the unmatched rows to `free_rows`; return how many there are."""
    free = (tl.load(column_of_row + lanes, mask=lanes < num_rows, other=0) < 0).to(tl.int32)
    tl.store(free_rows + tl.cumsum(free, axis=0) - 1, lanes, mask=free > 0)
    tl.debug_barrier()  # free_rows: written above, read by the caller
    return tl.sum(free, axis=0)


@triton.jit
def _load_rows(q, width, rows, valid, lanes):
    """(STEP, BLOCK) tile of the given rows of the quantised costs; INF in rows that are not valid."""
    inside = valid[:, None] & (lanes < width)[None, :]
    return tl.load(q + rows[:, None] * width + lanes[None, :], mask=inside, other=INF)


@triton.jit
def _auction(q, width, column_of_row, free_rows, num_rows, lanes, tile, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """All free rows bid for their best column at once; return prices, owners and the number of free rows.

    A bid is what the second-best column would cost more. The highest bid takes the column and lowers its price by it;
    a bid of 0 does not evict. Ties turn with the row, so that equal rows bid for different columns.
    """
    price = tl.full((BLOCK,), 0, tl.int32)
    owner = price - 1
    num_free = _list_free_rows(column_of_row, free_rows, num_rows, lanes)
    auction_round = 0
    while (num_free > 0) & (auction_round < AUCTION_ROUNDS):
        best = tl.full((BLOCK,), -1, tl.int32)
        bidder = tl.full((BLOCK,), 0, tl.int32)
        start = 0
        while start < num_free:
            valid = start + tile < num_free
            row = tl.load(free_rows + start + tile, mask=valid, other=0)
            reduced = _load_rows(q, width, row, valid, lanes) - price[None, :]
            first = tl.min(reduced, axis=1)
            turn = (lanes[None, :] - row[:, None]) & (BLOCK - 1)
            column = tl.min(tl.where(reduced == first[:, None], turn, BLOCK), axis=1) + row
            chosen = (column & (BLOCK - 1))[:, None] == lanes[None, :]
            second = tl.min(tl.where(chosen, INF, reduced), axis=1)
            bid = tl.where(valid, tl.minimum(second - first, FORBIDDEN), -1)
            offer, index = tl.max(
                tl.where(chosen, bid[:, None], -1), axis=0, return_indices=True, return_indices_tie_break_left=False
            )
            higher = offer > best
            best = tl.where(higher, offer, best)
            bidder = tl.where(higher, tl.gather(row, index, 0), bidder)
            start += TILE
        won = (best > 0) | ((best == 0) & (owner < 0))
        # Owners are matched rows and bidders are free ones, so no row is written twice.
        tl.store(column_of_row + owner, -1, mask=won & (owner >= 0))
        tl.store(column_of_row + bidder, lanes, mask=won)
        tl.debug_barrier()  # column_of_row: written above, read by _list_free_rows; free_rows: read before, now written
        price = tl.where(won, price - best, price)
        owner = tl.where(won, bidder, owner)
        num_free = _list_free_rows(column_of_row, free_rows, num_rows, lanes)
        progress = tl.max(won.to(tl.int32), axis=0) > 0
        auction_round = tl.where(progress, auction_round + 1, AUCTION_ROUNDS)
    return price, owner, num_free


@triton.jit
def _label_from_roots(q, width, free_rows, num_free, price, lanes, tile, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Distance of every column from its nearest free row, and ~row of that; ties turn with the column."""
    label = tl.full((BLOCK,), INF, tl.int32)
    parent = tl.full((BLOCK,), 0, tl.int32)
    turn = (tile[:, None] + lanes[None, :]) & (TILE - 1)
    start = 0
    while start < num_free:
        valid = start + tile < num_free
        row = tl.load(free_rows + start + tile, mask=valid, other=0)
        reduced = _load_rows(q, width, row, valid, lanes) - price[None, :]
        reduced -= tl.where(valid, tl.min(reduced, axis=1), 0)[:, None]
        nearest = tl.min(reduced, axis=0)
        index = tl.min(tl.where(reduced == nearest[None, :], turn, TILE), axis=0)
        root = tl.gather(row, (index - lanes) & (TILE - 1), 0)
        nearer = nearest < label
        label = tl.where(nearer, nearest, label)
        parent = tl.where(nearer, ~root, parent)
        start += TILE
    return label, parent


@triton.jit
def _select(open_label, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Least open label, and its place, in each of STEP interleaved sets of columns."""
    return tl.min(
        tl.reshape(open_label, (BLOCK // STEP, STEP)), axis=0, return_indices=True, return_indices_tie_break_left=False
    )


@triton.jit
def _grow_forest(
    q, width, price, owner, unmatched, label, parent, owners, offsets, step, max_steps, lanes, steps,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Correct the labels until no path to an unmatched column can get shorter.

    An open column is one whose label was lowered since its row was last relaxed. Only labels below `limit`, the
    largest of an unmatched column, can still matter. Edges are reduced costs >= 0 and labels fall strictly, so the
    parents form a forest at all times, although STEP rows are relaxed from labels of the same moment.
    """
    matched = owner >= 0
    tl.store(owners + lanes, owner)
    tl.store(offsets + lanes, price - tl.load(q + owner * width + lanes, mask=matched, other=0))
    tl.debug_barrier()  # owners, offsets: written above, only read below
    open_label = tl.where(matched, label, INF)
    limit = tl.max(tl.where(unmatched, label, -1), axis=0)
    least, place = _select(open_label, BLOCK, STEP)
    while (tl.min(least, axis=0) < limit) & (step < max_steps):
        valid = least < limit
        column = place * STEP + steps
        row = tl.load(owners + column, mask=valid, other=0)
        offset = tl.where(valid, least, INF) + tl.load(offsets + column, mask=valid, other=0)
        taken = (tl.arange(0, BLOCK // STEP)[:, None] == place[None, :]) & valid[None, :]
        open_label = tl.where(tl.reshape(taken.to(tl.int32), (BLOCK,)) > 0, INF, open_label)
        nearest, index = tl.min(
            tl.load(q + row[:, None] * width + lanes[None, :], mask=(lanes < width)[None, :]) + offset[:, None],
            axis=0, return_indices=True, return_indices_tie_break_left=False,
        )  # fmt: skip
        nearest -= price
        nearer = (nearest < label) & (lanes < width)
        via = tl.gather(row * BLOCK + column, index, 0)
        label = tl.where(nearer, nearest, label)
        parent = tl.where(nearer, via % BLOCK, parent)
        # One column of the slack row speaks for all of them: the others need not be opened by it.
        reopened = matched & (via // BLOCK != owner)
        open_label = tl.where(nearer, tl.where(reopened, nearest, INF), open_label)
        limit = tl.max(tl.where(unmatched, label, -1), axis=0)
        least, place = _select(open_label, BLOCK, STEP)
        step += 1
    complete = tl.min(least, axis=0) >= limit
    return label, parent, limit, step, complete


@triton.jit
def _augment(owner, parent, unmatched, owners, new_owners, parents, winners, lanes):
    """Every unmatched column walks up to its root; the first one of each root is matched, along its path."""
    tl.store(parents + lanes, parent)
    tl.store(new_owners + lanes, owner)
    tl.store(winners + lanes, tl.full(lanes.shape, INF, tl.int32))
    tl.debug_barrier()  # parents, winners, new_owners: written above; parents and owners are only read below
    at = lanes
    walking = unmatched
    root = lanes
    while tl.max(walking.to(tl.int32), axis=0) > 0:
        up = tl.load(parents + at, mask=walking, other=-1)
        root = tl.where(walking & (up < 0), ~up, root)
        walking = walking & (up >= 0)
        at = tl.where(walking, up, at)
    tl.atomic_min(winners + root, lanes, mask=unmatched, sem="relaxed", scope="cta")
    tl.debug_barrier()  # winners: written above, read below
    at = lanes
    walking = unmatched & (tl.load(winners + root, mask=unmatched, other=-1) == lanes)
    while tl.max(walking.to(tl.int32), axis=0) > 0:
        up = tl.load(parents + at, mask=walking, other=-1)
        row = tl.load(owners + up, mask=walking & (up >= 0), other=0)
        # Trees of different roots share no column, so no column is written twice.
        tl.store(new_owners + at, tl.where(up < 0, ~up, row), mask=walking)
        walking = walking & (up >= 0)
        at = tl.where(walking, up, at)
    tl.debug_barrier()  # new_owners: written above, read below
    return tl.load(new_owners + lanes)


@triton.jit
def _search_forests(
    q, width, price, owner, num_free, column_of_row, free_rows, owners, offsets, parents, winners, new_owners,
    num_rows, num_columns, max_steps, lanes, steps, tile, BLOCK: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grow forests from all free rows at once until none is free or the steps are used up; return prices and owners."""
    valid = lanes < num_columns
    # As many columns stay unmatched as there are free rows; the slack row, number num_rows, takes the others.
    unmatched = (owner < 0) & valid
    owner = tl.where(unmatched & (tl.cumsum(unmatched.to(tl.int32), axis=0) > num_free), num_rows, owner)
    step = 0
    while (num_free > 0) & (step < max_steps):
        price = tl.where(valid, price - tl.max(tl.where(valid, price, -INF), axis=0), 0)
        label, parent = _label_from_roots(q, width, free_rows, num_free, price, lanes, tile, BLOCK, TILE)
        label = tl.where(valid, label, 0)
        unmatched = (owner < 0) & valid
        label, parent, limit, step, complete = _grow_forest(
            q, width, price, owner, unmatched, label, parent, owners, offsets, step, max_steps, lanes, steps,
            BLOCK, STEP,
        )  # fmt: skip
        if complete:
            price += tl.where(valid, tl.minimum(label, limit), 0)
            owner = _augment(owner, parent, unmatched, owners, new_owners, parents, winners, lanes)
            tl.store(column_of_row + owner, lanes, mask=(owner >= 0) & (owner < num_rows))
            tl.debug_barrier()  # column_of_row: written above, read below; new_owners: read above, next time written
            num_free = _list_free_rows(column_of_row, free_rows, num_rows, lanes)
    return price, owner


@triton.jit
def _free_forbidden_rows(q, width, owner, column_of_row, free_rows, num_rows, lanes):
    """Drop the pairs of non-finite cost, which were tight at cost K and not at F; return owners and free rows."""
    paired = (owner >= 0) & (owner < num_rows)
    dropped = paired & (tl.load(q + owner * width + lanes, mask=paired, other=0) == FORBIDDEN)
    tl.store(column_of_row + owner, -1, mask=dropped)
    tl.debug_barrier()  # column_of_row: written above, read below; free_rows: read above, written below
    return tl.where(dropped, -1, owner), _list_free_rows(column_of_row, free_rows, num_rows, lanes)


@triton.jit
def _store_pairs(assignment, owner, row_ids, column_ids, swap, num_rows, lanes):
    """Write the pairs under the numbers that rows and columns have in the problem."""
    paired = (owner >= 0) & (owner < num_rows)
    row = tl.load(row_ids + owner, mask=paired, other=0)
    column = tl.load(column_ids + lanes, mask=paired, other=0)
    tl.store(assignment + tl.where(swap, column, row), tl.where(swap, row, column).to(tl.int64), mask=paired)


@triton.jit(
    do_not_specialize=[
        "cost", "row_mask", "column_mask", "stride_problem", "stride_row", "stride_column", "row_mask_stride_problem",
        "row_mask_stride", "column_mask_stride_problem", "column_mask_stride", "size_n", "size_t", "q_rows", "q_lines",
        "steps_per_column",
    ]
)  # fmt: skip
def solve_problem(
    cost, row_mask, column_mask, assignment, q, scratch,
    stride_problem: tl.int64, stride_row: tl.int64, stride_column: tl.int64,
    row_mask_stride_problem: tl.int64, row_mask_stride: tl.int64,
    column_mask_stride_problem: tl.int64, column_mask_stride: tl.int64,
    size_n, size_t, q_rows, q_lines, steps_per_column,
    BLOCK: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Solve problem number `program_id(0)`.

    cost (P, N, T) and the masks (P, N), (P, T) by strides; assignment (P, N) int64, contiguous; q (P, q_rows,
    32 q_lines) int32 with q_rows > min(N, T) and 32 q_lines >= max(N, T); scratch (P, 9, BLOCK) int32. The forest
    relaxes STEP rows at once and stops after steps_per_column times as many steps as there are columns; all other
    passes over q take TILE rows at once.
    """
    problem = tl.program_id(0).to(tl.int64)
    width = q_lines * 32
    cost += problem * stride_problem
    assignment += problem * size_n
    q += problem * q_rows * width
    scratch += problem * 9 * BLOCK
    column_of_row, free_rows = scratch + 2 * BLOCK, scratch + 3 * BLOCK
    owners = scratch + 4 * BLOCK
    offsets = scratch + 5 * BLOCK
    parents = scratch + 6 * BLOCK
    winners = scratch + 7 * BLOCK
    new_owners = scratch + 8 * BLOCK
    lanes = tl.arange(0, BLOCK)
    steps, tile = tl.arange(0, STEP), tl.arange(0, TILE)

    num_n = list_valid(row_mask + problem * row_mask_stride_problem, row_mask_stride, size_n, scratch, lanes)
    num_t = list_valid(
        column_mask + problem * column_mask_stride_problem, column_mask_stride, size_t, scratch + BLOCK, lanes
    )
    swap = num_n > num_t
    num_rows = tl.minimum(num_n, num_t)
    num_columns = tl.maximum(num_n, num_t)
    row_ids = scratch + tl.where(swap, BLOCK, 0)
    column_ids = scratch + tl.where(swap, 0, BLOCK)
    tl.store(assignment + lanes, tl.full((BLOCK,), -1, tl.int64), mask=lanes < size_n)
    tl.store(column_of_row + lanes, tl.full((BLOCK,), -1, tl.int32))
    tl.debug_barrier()  # row_ids, column_ids: written above, only read below; column_of_row
    quantize(
        cost, tl.where(swap, stride_column, stride_row), tl.where(swap, stride_row, stride_column), row_ids, column_ids,
        num_rows, num_columns, q, width, lanes, tile,
    )  # fmt: skip
    tl.debug_barrier()  # q: written above, only read below

    price, owner, num_free = _auction(q, width, column_of_row, free_rows, num_rows, lanes, tile, BLOCK, TILE)

    price, owner = _search_forests(
        q, width, price, owner, num_free, column_of_row, free_rows, owners, offsets, parents, winners, new_owners,
        num_rows, num_columns, steps_per_column * num_columns, lanes, steps, tile, BLOCK, STEP, TILE,
    )  # fmt: skip
    owner, num_free = _free_forbidden_rows(q, width, owner, column_of_row, free_rows, num_rows, lanes)
    owner = augment_one_by_one(
        q, width, price, owner, free_rows, num_free, num_columns, owners, new_owners, parents, lanes, BLOCK
    )

    _store_pairs(assignment, owner, row_ids, column_ids, swap, num_rows, lanes)
