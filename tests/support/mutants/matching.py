"""Faults in costs, matching, solvers and the choice of stages."""

from __future__ import annotations

from functools import partial

import torch

import detr_kd_losses as dkl
from detr_kd_losses import costs, matching, testing
from detr_kd_losses.assignment import _cpu
from detr_kd_losses.testing.makers import make_detection_arguments, make_distillation_arguments

from support import oracles
from support.mutants.mutant import faults, law, oracle

solver = partial(law, testing.ASSIGNMENT_LAWS, partial(dkl.linear_sum_assignment, backend="scipy"))
targets = partial(law, testing.TARGET_MATCHING_LAWS, dkl.match_targets)
teacher = partial(law, testing.TEACHER_MATCHING_LAWS, dkl.match_teacher)

SIZE = {"stages": 2, "images": 2, "classes": 3}
DISTILLATION = make_distillation_arguments(students=5, teachers=6, split=True, **SIZE)
DETECTION = make_detection_arguments(queries=6, targets=4, at_least=2, **SIZE)


def through_targets(max_examples):
    """More targets than either has queries, and queries without a target on both sides."""
    students, teachers = torch.tensor([[4, -1, 0, 2], [1, 0, 3, -1]]), torch.tensor([[-1, 2, 4], [0, -1, 5]])
    expected = oracles.match_through_targets(students.numpy(), teachers.numpy(), 6)
    assert dkl.match_through_targets(students, teachers, 6).tolist() == expected.tolist()


cost_value = oracle("detection_cost", DETECTION.without("target_mask").without("assignment"))


def depth(max_examples):
    """The last layer teaches the last layer."""
    teacher_stages = torch.arange(6)
    for student_stages in (1, 2, 3, 6, 7):
        assert dkl.select_stages(teacher_stages, student_stages)[-1] == 5
        assert len(dkl.select_stages(teacher_stages, student_stages)) == student_stages


MUTANTS = [
    *faults(
        _cpu.replace_non_finite,
        (
            "not finite costs the largest float",
            "finite = np.isfinite(cost)",
            "return np.nan_to_num(cost, nan=3e38, posinf=3e38, neginf=3e38)",
            solver("bad_numbers"),
        ),
        (
            "minus infinity wins",
            "finite = np.isfinite(cost)",
            "return np.nan_to_num(cost, nan=1e5, posinf=1e5, neginf=-1e5)",
            solver("bad_numbers"),
        ),
    ),
    *faults(
        dkl.linear_sum_assignment,
        ("costs transposed", "cost.detach()", "cost.detach().mT.reshape(cost.shape)", solver("optimal")),
        ("costs in float16", "cost.detach()", "cost.detach().half()", solver("planted")),
        ("costs in integers", "cost.detach()", "cost.detach().round()", solver("optimal")),
        ("maximum instead of minimum", "cost.detach()", "-cost.detach()", targets("optimal")),
        ("row mask ignored", "cost.detach()), row_mask", "cost.detach()), None", solver("masks")),
    ),
    *faults(
        _cpu.CpuBackend._solve_valid,
        ("columns not renumbered", "matched_columns = columns[matched_columns]", "pass", solver("masks")),
    ),
    *faults(
        dkl.match_targets,
        ("target mask forgotten", '"column_mask": mask', '"column_mask": mask | True', targets("target_padding")),
    ),
    *faults(
        matching._positives_first,
        (
            "negatives matched before positives",
            "column_mask=positive",
            "column_mask=~positive",
            teacher("optimal"),
        ),
    ),
    *faults(
        matching._share_rest,
        ("positives may be matched twice", "row_mask=assignment < 0", "row_mask=None", teacher("optimal")),
    ),
    *faults(
        dkl.match_through_targets,
        (
            "a query without a target gets a partner",
            "student_assignment >= 0",
            "student_assignment >= -1",
            through_targets,
        ),
        ("student for teacher", "invert_assignment(teacher_", "invert_assignment(student_", through_targets),
    ),
    *faults(
        dkl.detection_cost,
        (
            "overlap is a cost",
            "by_label = by_class.gather(-1, labels)",
            "by_label = by_class.gather(-1, labels); weight_giou = -weight_giou",
            cost_value,
        ),
        ("focal cost without its negative part", "by_class = positive - negative", "by_class = positive", cost_value),
    ),
    *faults(
        costs.distillation_costs,
        (
            "class cost transposed",
            " + logits @ scores.mT",
            " + logits.flip(-1) @ scores.mT",
            oracle("distillation_cost", DISTILLATION.without("teacher_positive").without("assignment")),
        ),
    ),
    *faults(
        dkl.stages._stage_indices,
        ("the first stage is skipped", "num_student_stages) - 1", "num_student_stages) - 2", depth),
    ),
    *faults(dkl.select_stages, ("the teacher's depth is cut", "stages == list(range(depth))", "stages[0] == 0", depth)),
]
