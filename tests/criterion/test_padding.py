"""What is not a number in padding reaches no value and no gradient, whichever way features take."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_kd_losses.testing.steps import make_step

CHANNELS = 4
STUDENT = {
    "same": (CHANNELS, (4, 6)),
    "projection": (3, (4, 6)),
    "larger": (CHANNELS, (8, 12)),
    "smaller": (CHANNELS, (2, 3)),
    "projection, larger": (3, (7, 11)),
}


def case(way, fill, *, student_mask=False, dtype=torch.float64):
    """Features of which the last third of the columns and an image's last half of the rows are padding."""
    channels, (height, width) = STUDENT[way]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def mask(height, width):
        rows, columns = (torch.arange(size) + 0.5 for size in (height, width))
        inside = (columns < width * 2 / 3).expand(2, height, width).clone()
        inside[1] &= (rows < height / 2).unsqueeze(-1)
        return inside

    student, teacher = draw(2, channels, height, width), draw(2, CHANNELS, 4, 6)
    for features, valid in ((student, mask(height, width)), (teacher, mask(4, 6))):
        features.masked_fill_(~valid.unsqueeze(1), fill)
    queries, quality = draw(2, 5, CHANNELS), torch.rand(2, 5, generator=generator, dtype=torch.float64)
    padding = mask(height, width) if student_mask else mask(4, 6)
    return student.to(dtype).requires_grad_(), teacher, queries, quality, padding


def evaluate(way, fill, **options):
    student, teacher, queries, quality, padding = case(way, fill, **options)
    torch.manual_seed(0)
    channels = student.shape[1]
    loss = dkl.TargetAwareFeatureLoss(*(() if channels == CHANNELS else (channels, CHANNELS))).double()
    value = loss(student, teacher, queries, quality, padding_mask=padding)
    gradients = torch.autograd.grad(value, [student, *loss.parameters()])
    return value.detach(), gradients


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("way", STUDENT)
def test_not_a_number_in_padding(way, fill):
    value, gradients = evaluate(way, fill)
    other, other_gradients = evaluate(way, float("nan"))
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert_close((value, gradients), (other, other_gradients), rtol=0, atol=0)


@pytest.mark.parametrize("way", ["same", "projection"])
def test_it_is_as_any_number_in_padding(way):
    """Where no cells are mixed, nothing in padding matters."""
    assert_close(evaluate(way, float("nan")), evaluate(way, 7.0), rtol=0, atol=1e-15)


@pytest.mark.parametrize("way", ["larger", "smaller"])
def test_a_cell_is_interpolated_from_the_cells_that_are_there(way):
    """A constant map stays constant up to its border, as it does without padding."""
    student, teacher, _, _, padding = case(way, float("nan"))
    constant = torch.where(student.detach().isnan(), student.detach(), 3.0)
    (resized,) = dkl.FeatureProjection()(constant, teacher, padding)
    valid = padding.unsqueeze(1).expand_as(resized)
    assert_close(resized[valid], torch.full_like(resized[valid], 3.0))


@pytest.mark.parametrize("way", STUDENT)
@pytest.mark.parametrize("given", ["student", "teacher", "both"])
def test_the_criterion_takes_the_masks_of_either_side(way, given):
    """A mask of the student's size serves the teacher's map, too."""
    student, teacher, _, _, own = case(way, float("nan"), student_mask=True, dtype=torch.float32)
    teacher_mask = case(way, 0.0)[-1]
    records = make_step(channels=CHANNELS)
    masks = {"student": (own, None), "teacher": (None, teacher_mask), "both": (own, teacher_mask)}[given]
    outputs = [
        output._replace(features=features, padding_mask=mask)
        for output, features, mask in zip(records[:2], (student, teacher.float()), masks, strict=True)
    ]
    channels = student.shape[1]
    term = dkl.FeatureTerm(*(() if channels == CHANNELS else (channels, CHANNELS)))
    loss = dkl.DETRDistillationLoss([term])(*outputs, records.targets)["loss_kd_feature"]
    loss.backward()
    assert loss.isfinite()
    assert loss > 0
    assert all(tensor.grad.isfinite().all() for tensor in (student, *term.parameters()))


@pytest.mark.parametrize(
    ("channels", "options", "message"),
    [
        ((3, 8), (), r"set `student_channels` and `teacher_channels`, one number per level, .*; got 3 and 8$"),
        ((5, 8), (3, 8), r"that `student_channels` and `teacher_channels` say for level 0, 3 and 8, got 5 and 8$"),
        ((3, 4), (3, 8), r"say for level 0, 3 and 8, got 3 and 4$"),
        ((3, 8), (8, 8), r"the same channels in level 0, or set `student_channels` .*; got 3 and 8$"),
    ],
)
def test_other_channels_say_which_option(channels, options, message):
    features = [torch.randn(2, number, 4, 5) for number in channels]
    queries, quality = torch.randn(2, 6, channels[1]), torch.rand(2, 6)
    with pytest.raises(ValueError, match=message):
        dkl.TargetAwareFeatureLoss(*options)(*features, queries, quality)


@pytest.mark.parametrize("channels", [2.0, 0, "8"])
def test_channels_are_whole_numbers(channels):
    with pytest.raises((TypeError, ValueError), match=r"^`channels` must be"):
        dkl.FeatureProjection([channels], [8])
