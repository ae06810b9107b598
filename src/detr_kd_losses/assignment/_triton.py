"""The GPU backend: all problems in one launch of a Triton kernel, without synchronising with the host."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_kd_losses._gpu import why_no_triton

__all__: list[str] = []

_MAX_SIZE = 2048
_MIN_CAPABILITY = (7, 0)
_MIN_TRITON = (3, 3)  # tl.gather
# Columns that a block holds: rows relaxed per step, and warps. More rows mean fewer steps. Of so few warps each has
# columns of its own, and a minimum over rows needs no exchange between threads; no register is spilled.
_LAUNCH = {64: (32, 1), 128: (32, 1), 256: (32, 2), 512: (32, 4), 1024: (32, 8), 2048: (16, 8)}


class TritonBackend:
    """Solves every problem of the batch in a program of its own, on the device of the costs.

    Costs become integers of 26 bits over the range of each problem's finite entries, so that n pairs cost at most
    n 2^-26 of that range more than the optimum. Nothing synchronises with the host, and a call can be captured in a
    CUDA graph. It needs 4 bytes of memory per cost. Triton is imported by the first call.

    Args:
        steps_per_column: How many steps of the fast phase a problem may take for each of its columns, before a plain
            augmenting-path search finishes it. Detection costs take 1 to 4, c = i j half its size.
    """

    device_type = "cuda"

    def __init__(self, *, steps_per_column: int = 32) -> None:
        self.steps_per_column = steps_per_column

    def unsupported_reasons(self, cost: Tensor) -> list[str]:
        """Triton missing or too old, no CUDA device (or interpreter), or a problem that is too large."""
        reasons = why_no_triton("cost", cost, capability=_MIN_CAPABILITY, version=_MIN_TRITON)
        if max(cost.shape[-2:]) > _MAX_SIZE:
            reasons.append(f"it takes at most {_MAX_SIZE} rows and columns")
        return reasons

    def solve(self, cost: Tensor, row_mask: Tensor | None, column_mask: Tensor | None) -> Tensor:
        """Launch the kernel, once."""
        problems, size_n, size_t = cost.shape
        if 0 in cost.shape:
            return cost.new_full((problems, size_n), -1, dtype=torch.int64)
        from detr_kd_losses.assignment._forest import solve_problem  # noqa: PLC0415

        block = _block(size_n, size_t)
        rows_per_step, num_warps = _LAUNCH[block]
        valid = cost.new_ones((), dtype=torch.bool)
        row_mask = valid.expand(problems, size_n) if row_mask is None else row_mask
        column_mask = valid.expand(problems, size_t) if column_mask is None else column_mask
        assignment = cost.new_empty((problems, size_n), dtype=torch.int64)
        # Rows start at multiples of 128 bytes; one row more than the smaller side for the slack row.
        q_rows, q_lines = min(size_n, size_t) + 1, -(-max(size_n, size_t) // 32)
        quantized = cost.new_empty((problems, q_rows, 32 * q_lines), dtype=torch.int32)
        scratch = cost.new_empty((problems, 9, block), dtype=torch.int32)
        with torch.cuda.device(cost.get_device()):  # none if -1, the CPU's
            solve_problem[(problems,)](
                cost,
                row_mask,
                column_mask,
                assignment,
                quantized,
                scratch,
                *cost.stride(),
                *row_mask.stride(),
                *column_mask.stride(),
                size_n,
                size_t,
                q_rows,
                q_lines,
                self.steps_per_column,
                BLOCK=block,
                STEP=rows_per_step,
                TILE=rows_per_step // 2,
                num_warps=num_warps,
                enable_fp_fusion=False,  # the same rounding everywhere
            )
        return assignment


def _block(size_n: int, size_t: int) -> int:
    """The smallest block that holds a row of the problem."""
    return next(block for block in _LAUNCH if block >= max(size_n, size_t))
