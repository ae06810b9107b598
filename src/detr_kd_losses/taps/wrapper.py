"""A trainer's own criterion with the terms of a distillation beside its own; the engine stays as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from detr_kd_losses.criterion import DETRDistillationLoss
from detr_kd_losses.outputs import Targets, pad_targets
from detr_kd_losses.taps.attached import AttachedTeacher, Levels, TeacherCall

__all__ = ["DistillationCriterion"]

TOTAL = "total_loss"  # where a criterion has summed its terms itself


class DistillationCriterion(AttachedTeacher):
    """A criterion that adds the terms of a distillation to those of a trainer's own.

    From now on the teacher runs before each forward pass of the student in training, under its autocast; the student is
    read, and the terms are added when the criterion is called. The class of the model, its parameters, its outputs, its
    checkpoints and its evaluation do not change: copies and pickles of the student know of nothing.

    Whatever an engine passes beside outputs and targets is for the original criterion, and so is what it asks of it.
    The terms are in its `weight_dict`, with weight 1, where an engine weighs and filters by it; where an engine sums
    all values, or takes a ``"total_loss"`` from them, they count as they are. :attr:`counted` says which it was.

    Args:
        criterion: The criterion; it answers a dict of losses.
        student: The student. One in DistributedDataParallel is unwrapped; `nn.DataParallel` is refused when it runs.
        teacher: The teacher. It is frozen, and no part of student or criterion.
        distillation: The losses. None: :func:`distillation_loss` of both models.
        levels: Feature levels of student and of teacher that correspond, where they have different ones.
        group_share: How many of the teacher's queries run through the student's decoder, the surest first.
        teacher_call: Called with the teacher and the arguments of the student's forward pass, where it needs others
            than the images and their masks: another size, another normalisation, ``dn_args=0`` for DN-DETR.
        read_targets: From the targets of the engine to :class:`Targets`, where they are no list of a dict for each
            image.

    Raises:
        ValueError: If student and teacher share parameters, a decoder is not found, or classes, heads or levels of both
            do not fit each other.
        TypeError: If an argument is not the Module that it should be.

    Examples:
        >>> class Decoder(nn.Module):  # is handed its heads, as that of RT-DETR
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers, self.hidden_dim = nn.ModuleList([nn.Linear(8, 8)]), 8
        ...     def forward(self, target, ref_points_unact, memory, spatial_shapes, bbox_head, score_head):
        ...         states = self.layers[0](target)
        ...         return bbox_head(states).sigmoid().unsqueeze(0), score_head(states).unsqueeze(0)
        >>> class Detector(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.decoder, self.boxes, self.classes = Decoder(), nn.Linear(8, 4), nn.Linear(8, 3)
        ...     def forward(self, images):
        ...         cells = images.flatten(2).transpose(1, 2)
        ...         return self.decoder(cells[:, :6], cells[:, :6, :4], cells, [(5, 5)], self.boxes, self.classes)
        >>> class OwnLoss(nn.Module):
        ...     def forward(self, outputs, targets, epoch=0):
        ...         return {"loss": outputs[0].mean()}
        >>> student, images = Detector(), torch.randn(2, 8, 5, 5)
        >>> criterion = DistillationCriterion(OwnLoss(), student, teacher=Detector())
        >>> targets = [{"labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.5)}] * 2
        >>> losses = criterion(student(images), targets, epoch=1)
        >>> sorted(losses)[:4]
        ['loss', 'loss_kd_bbox', 'loss_kd_class', 'loss_kd_feature']
    """

    def __init__(
        self,
        criterion: nn.Module,
        student: nn.Module,
        teacher: nn.Module,
        *,
        distillation: DETRDistillationLoss | None = None,
        levels: Levels | None = None,
        group_share: float = 1.0,
        teacher_call: TeacherCall | None = None,
        read_targets: Callable[[Any], Targets] = pad_targets,
    ) -> None:
        super().__init__(
            student,
            teacher,
            distillation=distillation,
            levels=levels,
            group_share=group_share,
            teacher_call=teacher_call,
        )
        self.criterion, self.read_targets = criterion, read_targets
        self.to(next(student.parameters()).device)
        self._steps, self._weights_were_read, self._total_was_taken = 0, False, False
        weights = getattr(criterion, "weight_dict", None)
        self._weights = None if weights is None else {**weights, **dict.fromkeys(self.distillation.names, 1.0)}

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the state of the original criterion alone, too, as of a run that began without a teacher."""
        of_others = self.criterion.state_dict(prefix=prefix)
        if {key for key in state if key.startswith(prefix)} == of_others.keys():
            own = {key: state.pop(key) for key in of_others}
            state |= {f"{prefix}criterion.{key.removeprefix(prefix)}": value for key, value in own.items()}
            for name in ("distillation", "query_projection"):
                state |= self.get_submodule(name).state_dict(prefix=f"{prefix}{name}.")
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, outputs: Any, targets: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the terms of the criterion, and in training those of the distillation.

        Args:
            outputs: Of the student, as they are.
            targets: As the engine has them.
            *args: For the original criterion.
            **kwargs: For the original criterion.

        Returns:
            All terms by name.

        Raises:
            RuntimeError: If the student trains and has made no forward pass: a copy of it has, for instance.
            TypeError: If the criterion answers no dict.
        """
        losses = self.criterion(outputs, targets, *args, **kwargs)
        said, self._said = self._said, None
        if said is None:
            self._validate_not_training(losses)
            return losses  # type: ignore[no-any-return]
        if not isinstance(losses, Mapping):
            msg = f"`criterion` must answer a dict of losses, got {type(losses).__name__}"
            raise TypeError(msg)
        terms = self._terms(said, self.read_targets(targets))
        losses = {**losses, **terms}
        if TOTAL in losses:
            losses[TOTAL] = losses[TOTAL] + torch.stack(list(terms.values())).sum()
            self._total_was_taken = True
        self._steps += 1
        if self._steps == 2:  # by now the engine has done with a step
            logging.getLogger(__name__).info("%s", self.counted)
        return losses

    def _validate_not_training(self, losses: Any) -> None:
        """Raise if losses of a batch that no teacher has seen are about to train a model."""
        terms = list(losses.values()) if isinstance(losses, Mapping) else [losses]
        have_gradients = any(isinstance(term, Tensor) and term.requires_grad for term in terms)
        if self.training and any(student.training or have_gradients for student in self._student):
            msg = (
                "the student must make a forward pass in training mode before its criterion is called, got none: the "
                "model that trains must be the student itself, no copy; `eval()` of the criterion, or `detach()`, "
                "leaves the original losses alone"
            )
            raise RuntimeError(msg)

    @property
    def counted(self) -> str:
        """How the engine counts the terms, as far as it has shown."""
        if self._total_was_taken:
            return f"the criterion sums its terms itself: those of the distillation are added to its {TOTAL!r}"
        if self._weights_were_read:
            return "the engine reads `weight_dict`, where the terms of the distillation have weight 1"
        if self._steps > 1:
            return "the engine sums all that the criterion answers: change weights in `distillation.terms`"
        return "not known before the second step"

    @property
    def weight_dict(self) -> dict[str, float]:
        """The weights of the original criterion, and 1 for each term of the distillation."""
        if self._weights is None:
            msg = f"{type(self.criterion).__name__} has no attribute 'weight_dict'"
            raise AttributeError(msg)
        self._weights_were_read = True
        return self._weights

    def check(self, call: Callable[[nn.Module], Any], targets: Any = None) -> bool:
        """Print whether the set-up is right (:func:`check_setup`).

        Args:
            call: Runs a model on a batch: ``lambda model: model(samples)``.
            targets: Targets of the batch, as the engine has them.

        Returns:
            Whether it is.

        Raises:
            RuntimeError: If this is a copy, or was detached.
        """
        return self._check(call, None if targets is None else self.read_targets(targets))

    def __getattr__(self, name: str) -> Any:
        """Answer for the original criterion, whose attributes some engines look at."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "criterion":
                raise
            return getattr(self.criterion, name)
