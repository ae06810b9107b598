"""Faults in the criterion."""

from __future__ import annotations

from functools import partial

import torch

import detr_kd_losses as dkl
from detr_kd_losses import testing
from detr_kd_losses.testing.makers import make_criterion_arguments
from detr_kd_losses.testing.signatures import group_outputs

from support.mutants.mutant import faults, law

criterion = partial(law, testing.CRITERION_LAWS, dkl.DETRDistillationLoss())

ARGUMENTS = make_criterion_arguments(stages=2, images=2, classes=3, students=5, teachers=6, targets=4)


def group_follows_teacher(max_examples):
    """The query group learns the teacher's assignment, whatever its own predictions are."""
    student, teacher, truth = group_outputs(ARGUMENTS.tensors)
    terms = dkl.DETRDistillationLoss([dkl.QueryGroupTerm()])(student, teacher, truth)
    assignment = dkl.match_targets(teacher.logits, teacher.boxes, *truth)
    own = dkl.teacher_assigned_query_loss(*student.group, *truth, assignment)
    for name, value in own.items():
        torch.testing.assert_close(terms[name.replace("loss_", "loss_kd_group_")], value)


MUTANTS = [
    *faults(
        dkl.QueryGroupTerm.compute,
        (
            "the group is matched afresh",
            "assignment = select_stages(step.of_group(step.teacher_assignment), len(logits), stage_map=self.stage_map)",
            "assignment = step._teacher_matching(step.student.group, step.known_targets, step.heads.student)",
            group_follows_teacher,
        ),
    ),
    *faults(
        dkl.FeatureTerm.compute,
        (
            "padding of the features is forgotten",
            "padding_mask=mask",
            "padding_mask=None",
            criterion("cell_padding"),
        ),
    ),
]
