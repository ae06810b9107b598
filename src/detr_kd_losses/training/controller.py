"""Weights that follow the gradients: each term keeps the share of the whole that it was given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from detr_kd_losses._validation import (
    validate_count,
    validate_in_unit_interval,
    validate_positive,
    validate_terms,
    validate_type,
)
from detr_kd_losses.training.diagnostics import gradient_norm, learned_among

__all__ = ["ShareController", "TermShare"]

# However far a share is from the wanted one, an update takes it for this much at most: one odd batch moves little.
_MOST = 10.0


class TermShare(NamedTuple):
    """What a controller has measured of a term, and what it made of it.

    Attributes:
        share: Share in [0, 1] of the term's gradient in the whole, before the update; NaN where a norm is not finite.
        wanted: Share that it is to have. None: it is left alone.
        weight: Weight of the term after the update.

    Examples:
        >>> TermShare(0.5, 0.2, 0.9).weight
        0.9
    """

    share: float
    wanted: float | None
    weight: float


class ShareController:
    r"""Moves the weights of terms until the gradient of each has its wanted share of the whole.

    .. math:: p_t = \frac{|g_t|}{|g_{task}| + \sum_s |g_s|}, \quad
        w_t \leftarrow w_t \left(\frac{p^*_t (1 - p_t)}{p_t (1 - p^*_t)}\right)^{rate}

    :math:`g_t` is the gradient of all losses of a term together, as it is weighted. A distillation loss that is ten or
    forty times the task's is the commonest complaint; this holds it at a tenth, say, however teacher and student
    change. The ratio counts as 10 or 1 / 10 at most. A term of weight 0 stays at 0, one that does not apply keeps its
    weight, and a norm that is not finite changes nothing. Nobody calls it unless you do:

        losses = criterion(student, teacher, targets)
        measured = controller.update(losses, task_loss, model.parameters())  # before backward; None between updates

    In several processes every one must call it in every step: an update averages the norms over them in one all-reduce
    of one float64 for the task and for each term, whatever a process has, so that all weights stay the same. Without
    torch.distributed there is none. Only an update waits for the device, for a backward pass of each term.

    Args:
        criterion: :class:`DETRDistillationLoss`, whose ``terms`` have the weights.
        shares: Wanted share by name of the term, each above 0, together below 1: the task has the rest. Other terms
            keep their weights.
        every: Number of steps from one update to the next; the first call is one.
        rate: Exponent in (0, 1]: how much of the way to the wanted share an update goes.
        bounds: Least and greatest weight of the terms in `shares`.

    Raises:
        ValueError: If a name is no term, a number does not fit, or a weight is beyond the `bounds`.
        TypeError: If an argument is not of its type.

    Examples:
        >>> from detr_kd_losses import DETRDistillationLoss, LogitsTerm
        >>> criterion = DETRDistillationLoss([LogitsTerm()])
        >>> controller = ShareController(criterion, {"logits": 0.2}, rate=1.0)
        >>> weight = torch.ones(3, requires_grad=True)
        >>> losses = {"loss_kd_class": weight.sum()}
        >>> controller.update(losses, weight.sum(), [weight])
        {'logits': TermShare(share=0.5, wanted=0.2, weight=0.25)}
        >>> criterion.terms["logits"].weight
        0.25

    References:
        The gradient-guided adaptive modulation of RT-DETRv4, arXiv:2510.25257, does it once an epoch for one module.
    """

    def __init__(
        self,
        criterion: nn.Module,
        shares: Mapping[str, float],
        *,
        every: int = 100,
        rate: float = 0.1,
        bounds: tuple[float, float] = (0.01, 100.0),
    ) -> None:
        terms = validate_terms(criterion)
        validate_count("every", every)
        validate_positive("rate", rate)
        validate_in_unit_interval("rate", rate)
        self.shares, self.bounds = _validated_shares(shares, terms), _validated_bounds(bounds)
        self.every, self.rate, self.steps = every, rate, 0
        self._terms = terms
        for name in self.shares:
            self._validate_weight(name, self._terms[name].weight)

    def update(
        self, losses: Mapping[str, Tensor], task_loss: Tensor, parameters: Iterable[Tensor]
    ) -> dict[str, TermShare] | None:
        """Count a step and, in every so many, measure the shares and move the weights of the next ones.

        Args:
            losses: What the criterion has returned, with their graph.
            task_loss: Scalar, the student's own loss.
            parameters: Those to differentiate by: all of the student, or of a layer that all terms share, which is
                cheaper.

        Returns:
            A :class:`TermShare` for each term of the criterion; None in a step without an update.

        Raises:
            ValueError: If there is no parameter that requires a gradient.
        """
        due = self.steps % self.every == 0
        self.steps += 1
        if not due:
            return None
        norms = self._measure(losses, task_loss, learned_among(parameters))
        whole = sum(norms)
        shares = [norm / whole if whole > 0 or math.isnan(whole) else 0.0 for norm in norms[1:]]
        for (name, term), share in zip(self._terms.items(), shares, strict=True):
            # Neither a term that does not apply nor one that is alone says how far its weight is from right.
            if name in self.shares and term.weight > 0 and math.isfinite(whole) and 0 < share < 1:
                term.weight = self._moved(term.weight, share, self.shares[name])
        return {
            name: TermShare(share, self.shares.get(name), term.weight)
            for (name, term), share in zip(self._terms.items(), shares, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, and the weights of the terms in `shares`."""
        return {"steps": self.steps, "weights": {name: float(self._terms[name].weight) for name in self.shares}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another controller of the same terms was, with its weights.

        Raises:
            ValueError: If the terms are others, or a weight is beyond the `bounds`.
        """
        steps, weights = state["steps"], dict(state["weights"])
        if set(weights) != set(self.shares):
            msg = f"`state` must have the weights of {sorted(self.shares)}, got those of {sorted(weights)}"
            raise ValueError(msg)
        for name, weight in weights.items():
            self._validate_weight(name, weight)
        self.steps = int(steps)
        for name, weight in weights.items():
            self._terms[name].weight = weight

    def _measure(self, losses: Mapping[str, Tensor], task_loss: Tensor, learned: list[Tensor]) -> list[float]:
        """Norms of the gradients of the task and of each term, averaged over replicas."""
        norms = [gradient_norm(task_loss, learned)]
        for term in self._terms.values():
            own = [losses[name] for name in term.names if name in losses]
            norms.append(gradient_norm(torch.stack(own).sum(), learned) if own else torch.zeros_like(norms[0]))
        packet = torch.stack([norm.detach().to(torch.float64) for norm in norms])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(packet)
            packet /= dist.get_world_size()
        measured: list[float] = packet.tolist()
        return measured

    def _moved(self, weight: float, share: float, wanted: float) -> float:
        """The weight after an update."""
        ratio = wanted * (1 - share) / (share * (1 - wanted))
        moved = float(weight * min(max(ratio, 1 / _MOST), _MOST) ** self.rate)
        return min(max(moved, self.bounds[0]), self.bounds[1])

    def _validate_weight(self, name: str, weight: float) -> None:
        least, greatest = self.bounds
        if weight != 0 and not least <= weight <= greatest:
            msg = f"the weight of term {name!r} must be 0 or in `bounds` {self.bounds}, got {weight!r}"
            raise ValueError(msg)


def _validated_shares(shares: Mapping[str, float], terms: Mapping[str, Any]) -> dict[str, float]:
    """The wanted shares, of terms that there are."""
    validate_type("shares", shares, Mapping, "a mapping from names of terms to shares")
    unknown = sorted(map(str, set(shares) - set(terms)))
    if unknown or not shares:
        msg = f"`shares` must name terms of the criterion, {sorted(terms)}, got {unknown or 'none'}"
        raise ValueError(msg)
    for name, share in shares.items():
        validate_positive(f"shares[{name!r}]", share)
    total = sum(shares.values())
    if not total < 1:
        msg = f"`shares` must leave the task's loss a part: together below 1, got {total!r}"
        raise ValueError(msg)
    return {name: float(share) for name, share in shares.items()}


def _validated_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    least, greatest = bounds
    validate_positive("bounds[0]", least)
    validate_positive("bounds[1]", greatest)
    if least > greatest:
        msg = f"`bounds` must be the least and the greatest weight, got {bounds!r}"
        raise ValueError(msg)
    return float(least), float(greatest)
