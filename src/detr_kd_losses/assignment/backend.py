"""What a solver of assignment problems must offer, to be one of the backends."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["Backend"]


class Backend(Protocol):
    """A solver for a batch of problems.

    The dispatcher has checked shapes and flattened the batch: `cost` is (P, N, T) in float32 or float64, detached,
    with any strides; the masks are (P, N) and (P, T) bool, True = takes part, or None. Any size may be 0.

    A solver of one matrix on the host becomes one by :class:`CpuBackend`.

    Attributes:
        device_type: Where it computes, say ``"cuda"``: ``"auto"`` prefers the backends of the device of the cost.
    """

    device_type: str

    def unsupported_reasons(self, cost: Tensor) -> list[str]:
        """Why this backend cannot solve problems like `cost` here and now; empty if it can."""
        ...

    def solve(self, cost: Tensor, row_mask: Tensor | None, column_mask: Tensor | None) -> Tensor:
        """Column of each row, -1 = none: (P, N) int64 on the device of `cost`.

        A maximum matching of valid rows and columns with the fewest non-finite entries and, among those, the least
        sum of finite ones. Deterministic; a problem does not disturb another.
        """
        ...
