"""Which decoder layer of the teacher teaches which decoder layer of the student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from detr_kd_losses._validation import validate_choice, validate_count, validate_ndim, validate_tensor

__all__ = ["StageMap", "select_stages"]

StageMap = Literal["even", "last"] | Sequence[int]


def select_stages(teacher: Tensor, num_student_stages: int, *, stage_map: StageMap = "even") -> Tensor:
    r"""Reindex the stages of a teacher tensor so that entry `k` teaches student stage `k`.

    ``"even"`` spreads the teacher's depth over the student's: student stage `k` learns from teacher stage
    :math:`round((k + 1) L_T / L_S) - 1` (halves up, at least 0), which is the identity at equal depth and always
    ends at the teacher's last stage. ``"last"`` takes the teacher's last stage for every student stage.

    Args:
        teacher: (L_T, ...), any tensor with decoder layers in dimension 0.
        num_student_stages: L_S, the number of decoder layers of the student.
        stage_map: ``"even"``, ``"last"``, or a sequence of L_S teacher stages (negative ones count from the end).

    Returns:
        (L_S, ...).

    Raises:
        ValueError: If the teacher has no stage, or a sequence has another length than L_S or a stage that the
            teacher has not.

    Examples:
        >>> select_stages(torch.arange(6), 3).tolist()
        [1, 3, 5]
        >>> select_stages(torch.arange(3), 6).tolist()
        [0, 0, 1, 1, 2, 2]
        >>> select_stages(torch.arange(6), 3, stage_map="last").tolist()
        [5, 5, 5]
    """
    validate_tensor("teacher", teacher)
    validate_ndim("teacher", teacher, 1, "(L, ...)")
    validate_count("num_student_stages", num_student_stages)
    depth = teacher.shape[0]
    if depth == 0:
        msg = f"`teacher` must have at least one stage in dimension 0, got shape {tuple(teacher.shape)}"
        raise ValueError(msg)
    stages = _stage_indices(depth, num_student_stages, stage_map)
    if stages == list(range(depth)):
        return teacher
    # Views, not an index tensor: an index would be copied from the host, which stalls a GPU.
    return torch.stack([teacher[stage] for stage in stages])


def validate_stage_map(name: str, value: object) -> None:
    """Raise unless `value` is a stage map, as far as it can be told without the depths."""
    if isinstance(value, str):
        validate_choice(name, value, ("even", "last"))
    elif not isinstance(value, Sequence) or not all(type(stage) is int for stage in value):
        msg = f"`{name}` must be 'even', 'last' or a sequence of teacher stages, got {value!r}"
        raise TypeError(msg)


def _stage_indices(depth: int, num_student_stages: int, stage_map: StageMap) -> list[int]:
    validate_stage_map("stage_map", stage_map)
    if isinstance(stage_map, str):
        if stage_map == "last":
            return [depth - 1] * num_student_stages
        nearest = [
            (2 * (k + 1) * depth + num_student_stages) // (2 * num_student_stages) - 1
            for k in range(num_student_stages)
        ]
        return [max(stage, 0) for stage in nearest]
    stages = list(stage_map)
    if len(stages) != num_student_stages:
        msg = (
            f"`stage_map` must have one teacher stage for each of the {num_student_stages} student stages, got {stages}"
        )
        raise ValueError(msg)
    if any(not -depth <= stage < depth for stage in stages):
        msg = f"`stage_map` must have stages in [-{depth}, {depth}), got {stages}"
        raise ValueError(msg)
    return [stage % depth for stage in stages]
