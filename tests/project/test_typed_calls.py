"""A call of a Module has the types of its `forward`.

mypy reads this file, too (`make lint`). An ignore that is not needed is an error there, so a wrong call must be one.
"""

from __future__ import annotations

import inspect

import pytest
from torch import Tensor, nn
from typing_extensions import assert_type

import detr_kd_losses as dkl
from detr_kd_losses import taps
from detr_kd_losses._options import TypedCall

Losses = dict[str, Tensor]
MODULES = [
    module
    for names in (dkl, taps)
    for name in names.__all__
    if inspect.isclass(module := getattr(names, name)) and issubclass(module, nn.Module)
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_module_has_typed_calls(module: type[nn.Module]) -> None:
    assert issubclass(module, TypedCall)
    assert module.__call__ is nn.Module.__call__  # at run time, PyTorch's own


class OwnTerm(dkl.Term):
    def compute(self, step: dkl.Step) -> Losses:
        return {"own": step.zero()}


def right_calls(
    student: dkl.DetectorOutput, teacher: dkl.DetectorOutput, targets: dkl.Targets, step: dkl.Step, tensor: Tensor
) -> None:
    """What mypy says of the types."""
    assert_type(dkl.DETRDistillationLoss()(student, teacher, targets), Losses)
    assert_type(dkl.LogitsTerm()(step), Losses)
    assert_type(OwnTerm()(step), Losses)
    assert_type(dkl.TargetMatching()(dkl.Predictions(tensor, tensor), targets, "sigmoid"), Tensor)
    assert_type(dkl.HungarianDistillationLoss()(*[tensor] * 5, teacher_positive=tensor), Losses)
    assert_type(dkl.TargetAwareFeatureLoss()(tensor, [tensor], tensor, tensor), Tensor)
    assert_type(dkl.FeatureProjection()(tensor, tensor), list[Tensor])


def calls_of_taps(
    criterion: taps.DistillationCriterion, projection: taps.QueryProjection, group: taps.QueryGroup, outputs: object
) -> None:
    """The same, of what meets a trainer."""
    assert_type(criterion(outputs, [], epoch=1), Losses)
    assert_type(projection(group), taps.QueryGroup)
    projection(outputs)  # type: ignore[arg-type]


def wrong_calls(student: dkl.DetectorOutput, targets: dkl.Targets, tensor: Tensor) -> None:
    """What mypy says of them."""
    dkl.DETRDistillationLoss()(student, targets)  # type: ignore[call-arg]
    dkl.DETRDistillationLoss()(student, student, [{"labels": tensor}])  # type: ignore[arg-type]
    dkl.LogitsTerm()(student)  # type: ignore[arg-type]
    dkl.DetectionLoss()(tensor, tensor, tensor, tensor, tensor, "assignment")  # type: ignore[arg-type]
    dkl.HungarianDistillationLoss()(*[tensor] * 5, temperature=2.0)  # type: ignore[call-arg]
