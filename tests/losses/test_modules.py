"""What every loss owes, whatever it computes; that its Module is the function; the projection of features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import detr_kd_losses as dkl

from support import cases
from support.comparisons import assert_agrees_with_oracle, evaluate, to_tensors
from support.registry import TRIALS
from support.tolerances import TOLERANCES, assert_close

every_loss = pytest.mark.parametrize(("loss", "trial"), TRIALS.values(), ids=TRIALS)


@every_loss
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_agrees_with_the_oracle_of_its_name(loss, trial, dtype):
    assert_agrees_with_oracle(loss.function, loss.oracle, trial.case, dtype, wrt=loss.wrt, **trial.options)


def flat(values):
    return [level for value in values for level in (value if isinstance(value, list) else [value])]


@every_loss
def test_gradcheck(loss, trial):
    arguments = to_tensors(trial.case)
    inputs = flat(arguments[name] for name in loss.wrt)

    def function(*leaves):
        rest = iter(leaves)
        replaced = {
            name: [next(rest) for _ in arguments[name]] if isinstance(arguments[name], list) else next(rest)
            for name in loss.wrt
        }
        terms = loss.function(**{**arguments, **replaced}, **trial.options)
        return tuple(terms.values()) if isinstance(terms, dict) else terms

    assert torch.autograd.gradcheck(function, inputs)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, trial, dtype):
    arguments = to_tensors(trial.case, dtype)
    rounded = to_tensors(
        {
            name: [x.detach().double().numpy() if x.is_floating_point() else x.numpy() for x in value]
            if isinstance(value, list)
            else (value.detach().double() if value.is_floating_point() else value).numpy()
            for name, value in arguments.items()
        },
        torch.float32,
    )
    terms, gradients = evaluate(loss.function, arguments, **trial.options)
    expected_terms, expected_gradients = evaluate(loss.function, rounded, **trial.options)
    assert all(term.dtype == torch.float32 for term in terms.values())
    torch.testing.assert_close(terms, expected_terms, rtol=0, atol=0)
    for name in loss.wrt:
        rounded_gradients = [gradient.to(dtype) for gradient in expected_gradients[name]]
        torch.testing.assert_close(gradients[name], rounded_gradients, rtol=0, atol=0)


@every_loss
def test_module_is_the_function(loss, trial):
    """By the options that it is made with, and by those that are set later."""
    terms, gradients = evaluate(loss.function, to_tensors(trial.case), **trial.options)
    changed = loss.module()
    for name, value in trial.options.items():
        setattr(changed, name, torch.tensor(value) if name == "class_map" else value)
    for module in (loss.module(**trial.options), changed):
        module_terms, module_gradients = evaluate(module, to_tensors(trial.case))
        torch.testing.assert_close(module_terms, terms, rtol=0, atol=0)
        for name in loss.wrt:
            torch.testing.assert_close(module_gradients[name], gradients[name], rtol=0, atol=0)


@every_loss
def test_module_shows_its_options(loss, trial):
    shown = repr(loss.module(**trial.options))
    for name, value in trial.options.items():
        assert f"{name}=" in shown
        assert name == "class_map" or f"{name}={value!r}" in shown


@every_loss
def test_options_are_keyword_only(loss, trial):
    with pytest.raises(TypeError, match="positional"):
        loss.function(*to_tensors(trial.case).values(), "an option")
    with pytest.raises(TypeError, match="unexpected keyword"):
        loss.module(an_option=1)


def test_class_map_moves_with_the_module_but_not_into_checkpoints():
    module = dkl.HungarianDistillationLoss(class_map=[1, 0])
    assert module.to("meta").class_map.device.type == "meta"
    assert not module.state_dict()


def test_module_rejects_a_class_map_out_of_range():
    """As the function does: a list in its constructor has nothing to wait for."""
    arguments = to_tensors(cases.distillation())
    with pytest.raises(ValueError, match=r"`class_map` must have entries in \[-1, 4\), got 4"):
        dkl.HungarianDistillationLoss(class_map=[0, 1, 2, 4])(**arguments)


def of_other_shape(case, channels, sizes):
    """The student's levels with other channels and sizes."""
    rng = np.random.default_rng(1)
    levels = [rng.normal(size=(cases.IMAGES, c, *size)) for c, size in zip(channels, sizes, strict=True)]
    return {**case, "student_features": levels}


def test_projection_maps_channels_and_sizes():
    """phi is a 1 x 1 convolution per level, then bilinear interpolation; a level that fits stays as it is."""
    case = of_other_shape(cases.features(), channels=(3, cases.CHANNELS), sizes=((2, 2), (2, 2)))
    module = dkl.TargetAwareFeatureLoss((3, cases.CHANNELS), (cases.CHANNELS,) * 2).double()
    arguments = to_tensors(case)
    loss = module(**arguments)
    loss.backward()
    weight, bias = module.parameters()
    assert weight.shape == (cases.CHANNELS, 3, 1, 1)
    assert bias.shape == (cases.CHANNELS,)
    assert set(module.state_dict()) == {name for name, _ in module.named_parameters()}
    for parameter in (weight, bias):
        assert parameter.grad.abs().sum() > 0
    projected = torch.einsum("bchw,dc->bdhw", arguments["student_features"][0], weight[:, :, 0, 0])
    resized = F.interpolate(projected + bias[:, None, None], (4, 3), mode="bilinear", align_corners=False)
    students = [resized, arguments["student_features"][1]]
    expected = dkl.target_aware_feature_loss(**{**arguments, "student_features": students})
    assert_close(loss, expected.item())
    for level in arguments["student_features"]:
        assert level.grad.abs().sum() > 0
    assert arguments["teacher_queries"].grad is None


def test_projection_learns():
    """An optimizer over the Module's parameters brings a linear student to its teacher."""
    case = to_tensors(cases.features(padded=False))
    students = [level.detach() for level in case["student_features"]]
    mixing = torch.tensor(np.random.default_rng(2).normal(size=(cases.CHANNELS, cases.CHANNELS)))
    case["student_features"] = students
    case["teacher_features"] = [torch.einsum("bchw,dc->bdhw", level, mixing) for level in students]
    module = dkl.TargetAwareFeatureLoss((cases.CHANNELS,) * 2, (cases.CHANNELS,) * 2, normalize="mean").double()
    assert not list(module.parameters())  # equal channels need no projection
    for level in range(len(students)):
        module.projections[level] = torch.nn.Conv2d(cases.CHANNELS, cases.CHANNELS, 1).double()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = module(**case)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_projection_takes_half_precision():
    """As the function does; the projection's own parameters stay in float32."""
    case = of_other_shape(cases.features(), channels=(3, 3), sizes=((4, 3), (2, 2)))
    module = dkl.TargetAwareFeatureLoss((3, 3), (cases.CHANNELS,) * 2)
    loss = module(**to_tensors(case, torch.bfloat16))
    assert loss.dtype == torch.float32
    loss.backward()


@pytest.mark.parametrize(
    ("student_channels", "teacher_channels"), [((3, 4), (5,)), (3, None), (None, (5, 5)), (3, (5, 5))]
)
def test_projection_needs_channels_in_pairs(student_channels, teacher_channels):
    with pytest.raises(ValueError, match="`student_channels` and `teacher_channels` must have one number per level"):
        dkl.TargetAwareFeatureLoss(student_channels, teacher_channels)


def test_projection_has_a_number_of_levels():
    module = dkl.TargetAwareFeatureLoss(cases.CHANNELS, cases.CHANNELS)
    with pytest.raises(ValueError, match=r"`student_features` must have the 1 levels that .* has, got 2"):
        module(**to_tensors(cases.features()))


@pytest.mark.parametrize("name", ["student_features", "teacher_features"])
@pytest.mark.parametrize("channels", [None, (cases.CHANNELS,) * 2])
def test_module_misses_no_level(channels, name):
    arguments = to_tensors(cases.features(padded=False))
    arguments[name] = arguments[name][:1]
    with pytest.raises(ValueError, match=r"must have .* levels"):
        dkl.TargetAwareFeatureLoss(channels, channels)(**arguments)
