"""A model that answers its own losses, with the terms of a distillation beside them; its trainer stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from detr_kd_losses.criterion import DETRDistillationLoss
from detr_kd_losses.outputs import Targets
from detr_kd_losses.taps.attached import AttachedTeacher, Levels, TeacherCall

__all__ = ["ModelDistillation"]


def add_terms(answer: Any, terms: Mapping[str, Tensor]) -> Any:
    """Return what a model has answered in training, with terms added where its trainer looks.

    Args:
        answer: The loss; or a tuple that begins with it, where a dict is of what is logged; or a dict of losses, that
            the trainer sums.
        terms: The terms.

    Returns:
        The same with the terms: added to the loss, and to each dict under their names.

    Raises:
        TypeError: If it is nothing of these.
    """
    total = torch.stack(list(terms.values())).sum()
    if isinstance(answer, Tensor):
        return answer + total
    if isinstance(answer, tuple) and answer and isinstance(answer[0], Tensor):
        logged = {name: term.detach() for name, term in terms.items()}
        return answer[0] + total, *({**part, **logged} if isinstance(part, dict) else part for part in answer[1:])
    if type(answer) is dict:
        return {**answer, **terms}
    msg = (
        "`student` must answer a loss, a tuple that begins with it, or a dict of losses in training, got "
        f"{type(answer).__name__}: give `add`, which returns it with the terms"
    )
    raise TypeError(msg)


class ModelDistillation(AttachedTeacher):
    """Adds the terms of a distillation to the losses that a model answers itself, as those of Ultralytics do.

    From now on the teacher runs before each forward pass of the student in training, and what the student answers has
    the terms in it. Nothing else changes: neither its class nor its parameters, its checkpoints, its evaluation. Copies
    and pickles of it, such as an average of weights, know of nothing.

    Args:
        student: The student. One in DistributedDataParallel is unwrapped.
        teacher: The teacher. It is frozen, and no part of the student.
        read_targets: From the arguments of the student's forward pass to :class:`Targets`.
        add: From what the student answers and the terms by name to what it shall answer (:func:`add_terms`).
        distillation: The losses. None: :func:`distillation_loss` of both models.
        levels: Feature levels of student and of teacher that correspond, where they have different ones.
        group_share: How many of the teacher's queries run through the student's decoder, the surest first.
        teacher_call: Called with the teacher and the arguments of the student's forward pass, where it needs others
            than the images, such as a part of a batch.

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
        ...     def forward(self, batch):
        ...         cells = batch["images"].flatten(2).transpose(1, 2)
        ...         boxes, _ = self.decoder(cells[:, :6], cells[:, :6, :4], cells, [(5, 5)], self.boxes, self.classes)
        ...         return boxes.mean(), {"own": boxes.mean().detach()}
        >>> from detr_kd_losses import pad_targets
        >>> student = Detector()
        >>> distillation = ModelDistillation(
        ...     student,
        ...     teacher=Detector(),
        ...     teacher_call=lambda teacher, batch: teacher(batch),
        ...     read_targets=lambda batch: pad_targets(batch["targets"]),
        ... )
        >>> targets = [{"labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.5)}] * 2
        >>> loss, logged = student({"images": torch.randn(2, 8, 5, 5), "targets": targets})
        >>> sorted(logged)[:3]
        ['loss_kd_bbox', 'loss_kd_class', 'loss_kd_feature']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        read_targets: Callable[..., Targets],
        add: Callable[[Any, Mapping[str, Tensor]], Any] = add_terms,
        distillation: DETRDistillationLoss | None = None,
        levels: Levels | None = None,
        group_share: float = 1.0,
        teacher_call: TeacherCall | None = None,
    ) -> None:
        super().__init__(
            student,
            teacher,
            distillation=distillation,
            levels=levels,
            group_share=group_share,
            teacher_call=teacher_call,
        )
        self.read_targets, self.add = read_targets, add

    def _after(self, *call: Any) -> Any:
        """Read the student; its answer becomes that with the terms."""
        super()._after(*call)
        _, args, kwargs, outputs = call
        said, self._said = self._said, None
        if said is None:
            return None
        return self.add(outputs, self._terms(said, self.read_targets(*args, **kwargs)))

    def check(self, call: Callable[[nn.Module], Any], targets: Targets | None = None) -> bool:
        """Print whether the set-up is right (:func:`check_setup`).

        Args:
            call: Runs a model on a batch: ``lambda model: model(images)``.
            targets: Targets of the batch.

        Returns:
            Whether it is.

        Raises:
            RuntimeError: If this is a copy, or was detached.
        """
        return self._check(call, targets)
