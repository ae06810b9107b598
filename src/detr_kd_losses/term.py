"""What a term is: a part of a distillation loss, with a weight of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from detr_kd_losses._options import OptionModule, Rules, text
from detr_kd_losses._reduction import share_nothing
from detr_kd_losses._validation import validate_not_negative
from detr_kd_losses.heads import Heads
from detr_kd_losses.step import Step

__all__ = ["Term"]


class Term(OptionModule):
    """A part of a distillation loss: a :class:`Step` in, named scalars out, times a weight of its own.

    A term of your own says what it returns and computes it:

        >>> class MeanScoreTerm(Term):
        ...     parts = ("score",)
        ...     def compute(self, step):
        ...         gap = step.student.logits[-1].sigmoid().mean() - step.teacher_logits[-1].sigmoid().mean()
        ...         return {"score": gap.square()}
        >>> MeanScoreTerm(weight=2.0).names
        ('loss_kd_score',)

    Args:
        weight: What all its parts are multiplied with. At 0 nothing is computed, and they are 0.
        prefix: Where the names of its parts begin; two terms of a kind in one criterion need two.

    Attributes:
        parts: What it returns, by name without the prefix.
        needs: Fields of :class:`DetectorOutput` without which it does not apply. If it has parameters, it is 0 then.
        shares_counts: Whether `compute` calls one loss that averages its counts over replicas. Then it takes part in
            every step, one in which its weight is 0 or it does not apply on this replica included, so that none waits.
    """

    parts: ClassVar[Sequence[str]] = ()
    needs: ClassVar[Sequence[str]] = ()
    shares_counts: ClassVar[bool] = False
    rules: ClassVar[Rules] = {"weight": validate_not_negative, "prefix": text}

    def __init__(self, *, weight: float = 1.0, prefix: str = "loss_kd_", **options: Any) -> None:
        super().__init__(weight=weight, prefix=prefix, **options)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its scalars, known before the first step."""
        return tuple(f"{self.prefix}{part}" for part in self.parts)

    def validate_heads(self, heads: Heads) -> None:
        """Raise unless the options fit the heads."""

    def compute(self, step: Step) -> dict[str, Tensor]:  # noqa: ARG002
        """The scalars by part, unweighted; a ``loss_`` in front of a part does not matter."""
        msg = f"`{type(self).__name__}` must define compute(step)"
        raise TypeError(msg)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """The scalars by name, weighted; none where the term does not apply, unless it has parameters."""
        given = [getattr(output, field) for output in (step.student, step.teacher) for field in self.needs]
        applies = not self.needs or any(value is not None for value in given)
        if self.weight == 0 or not applies:
            if self.shares_counts:
                share_nothing(step.student.logits, sync=self.call_options.get("sync_normalizer", True))
            # Parameters of its own get a gradient of 0, as data-parallel training expects of every parameter.
            parameters = [parameter.flatten()[:0].sum() for parameter in self.parameters()]
            return dict.fromkeys(self.names, sum(parameters, step.zero(*self.needs))) if applies or parameters else {}
        losses = {name.removeprefix("loss_"): loss for name, loss in self.compute(step).items()}
        if set(losses) != set(self.parts):
            msg = f"`{type(self).__name__}.compute` must return the `parts` {tuple(self.parts)}, got {tuple(losses)}"
            raise ValueError(msg)
        return {f"{self.prefix}{part}": self.weight * step.or_nan(loss) for part, loss in losses.items()}
