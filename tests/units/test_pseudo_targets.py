"""Pseudo targets, against loops: what a teacher is sure of, and where no label is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import detr_kd_losses as dkl

from support.oracles import box_iou
from support.steps import make_output

IMAGES, QUERIES, CLASSES = 3, 7, 4
seeds = st.integers(0, 999)


def predictions(seed: int, channels: int = CLASSES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, IMAGES, QUERIES, channels, generator=generator, dtype=torch.float64)
    return logits, 0.2 + 0.3 * torch.rand(2, IMAGES, QUERIES, 4, generator=generator, dtype=torch.float64)


def in_loops(
    logits: Tensor, boxes: Tensor, threshold: float, number: int, activation: str, class_map: list[int] | None
) -> list[list[tuple[float, int, list[float]]]]:
    """Score, label and box of each image, the surest first."""
    images = []
    for image in range(len(logits)):
        found = []
        for query in range(QUERIES):
            row = logits[image, query]
            channels = (row.softmax(0)[:-1] if activation == "softmax" else row.sigmoid()).tolist()
            scores: dict[int, float] = {}
            for channel, score in enumerate(channels):
                label = channel if class_map is None else class_map[channel]
                if label >= 0:
                    merged = scores.get(label, 0.0)
                    scores[label] = merged + score if activation == "softmax" else max(merged, score)
            label = max(scores, key=scores.__getitem__, default=-1)
            if label >= 0 and scores[label] >= threshold:
                found.append((scores[label], label, boxes[image, query].tolist()))
        images.append(sorted(found, reverse=True)[:number])
    return images


@pytest.mark.parametrize("number", [3, QUERIES, QUERIES + 2])
@pytest.mark.parametrize("class_map", [None, [5, 2, 5, -1], [-1, -1, -1, -1]])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@given(seed=seeds, threshold=st.sampled_from([0.0, 0.4, 0.6, 0.99]))
def test_agrees_with_loops(activation, class_map, number, seed, threshold):
    logits, boxes = predictions(seed, CLASSES + (activation == "softmax"))
    targets = dkl.pseudo_targets(
        logits, boxes, threshold=threshold, max_targets=number, activation=activation, class_map=class_map
    )
    assert targets.labels.shape == targets.mask.shape == (IMAGES, number)
    for image, expected in enumerate(in_loops(logits[-1], boxes[-1], threshold, number, activation, class_map)):
        count = len(expected)
        assert targets.mask[image].tolist() == [True] * count + [False] * (number - count)
        assert targets.labels[image].tolist() == [label for _, label, _ in expected] + [0] * (number - count)
        assert targets.boxes[image].tolist() == [box for _, _, box in expected] + [[0.0] * 4] * (number - count)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_classes_are_merged_as_in_the_logits(activation):
    logits, boxes = predictions(3, CLASSES + (activation == "softmax"))
    class_map, options = [1, 0, 1, -1], {"threshold": 0.3, "max_targets": QUERIES, "activation": activation}
    mapped = dkl.map_class_logits(logits, class_map, 2, activation=activation)
    expected = dkl.pseudo_targets(mapped, boxes, **options)
    assert_close(dkl.pseudo_targets(logits, boxes, class_map=class_map, **options), expected)
    as_tensor = dkl.pseudo_targets(logits, boxes, class_map=torch.tensor(class_map), **options)
    assert_close(as_tensor, expected)


def test_the_threshold_itself_is_enough():
    targets = dkl.pseudo_targets(torch.zeros(1, 1, 1), torch.rand(1, 1, 4), threshold=0.5, max_targets=1)
    assert targets.mask.all()


def test_without_stages_and_without_gradient():
    logits, boxes = (tensor.requires_grad_() for tensor in predictions(0))
    staged = dkl.pseudo_targets(logits, boxes, threshold=0.5, max_targets=4)
    assert_close(dkl.pseudo_targets(logits[-1], boxes[-1], threshold=0.5, max_targets=4), staged)
    assert not staged.boxes.requires_grad


def test_what_is_not_finite_is_no_target():
    logits, boxes = torch.full((1, 4, 2), 3.0), torch.full((1, 4, 4), 0.5)
    logits[0, 0, 1] = torch.nan
    boxes[0, 1, 2] = torch.nan
    boxes[0, 2, 0] = torch.inf
    targets = dkl.pseudo_targets(logits, boxes, threshold=0.5, max_targets=4)
    assert targets.mask.tolist() == [[True, False, False, False]]
    assert targets.boxes.isfinite().all()


def test_half_precision_is_computed_in_float32():
    logits, boxes = (tensor.bfloat16() for tensor in predictions(1))
    targets = dkl.pseudo_targets(logits, boxes, threshold=0.4, max_targets=4)
    assert_close(targets, dkl.pseudo_targets(logits.float(), boxes.float(), threshold=0.4, max_targets=4))


def of_images(seed: int, number: int) -> dkl.Targets:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(IMAGES, number, *shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return dkl.Targets((9 * draw()).long(), 0.3 + 0.3 * draw(4), draw() > 0.4)


@given(seed=seeds, max_iou=st.sampled_from([0.0, 0.3, 0.6, 1.0]), labels=st.integers(0, 4))
def test_added_where_no_label_overlaps(seed, max_iou, labels):
    targets, pseudo = of_images(seed, labels), of_images(seed + 1, 5)
    both = dkl.add_pseudo_targets(targets, pseudo, max_iou=max_iou)
    assert_close(dkl.Targets(both.labels[:, :labels], both.boxes[:, :labels], both.mask[:, :labels]), targets)
    for image in range(IMAGES):
        own = targets.boxes[image][targets.mask[image]].numpy()
        for query in range(5):
            box, at = pseudo.boxes[image, query], labels + query
            free = all(box_iou(box.numpy(), label) < max_iou for label in own)
            kept = bool(pseudo.mask[image, query]) and free
            assert bool(both.mask[image, at]) == kept
            assert both.labels[image, at] == (pseudo.labels[image, query] if kept else 0)
            assert_close(both.boxes[image, at], box if kept else torch.zeros(4, dtype=torch.float64))


def test_what_padding_holds_does_not_matter():
    targets, pseudo = of_images(0, 4), of_images(1, 5)
    broken = [part._replace(boxes=part.boxes.where(part.mask.unsqueeze(-1), torch.nan)) for part in (targets, pseudo)]
    expected, both = dkl.add_pseudo_targets(targets, pseudo), dkl.add_pseudo_targets(*broken)
    assert_close(both.mask, expected.mask)
    assert_close(both.boxes[both.mask], expected.boxes[expected.mask])


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated:DeprecationWarning")
def test_they_teach_and_compile():
    """An unlabelled batch, through the criterion, in one graph."""
    student, teacher = make_output(0, 3, 6, requires_grad=True), make_output(1, 3, 9)
    criterion = dkl.DETRDistillationLoss([dkl.LogitsTerm(matching="targets")])

    def loss(student, teacher):
        said = dkl.pseudo_targets(teacher.logits, teacher.boxes, threshold=0.3, max_targets=4, class_map=range(5))
        return criterion(student, teacher, dkl.add_pseudo_targets(said, said, max_iou=0.9))

    expected = loss(student, teacher)
    assert sum(expected.values()) > 0
    torch.compiler.reset()
    assert_close(torch.compile(loss, fullgraph=True, backend="eager")(student, teacher), expected)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": 1.5}, ValueError, r"`threshold` must be in \[0, 1\], got 1.5"),
        ({"max_targets": 0}, ValueError, "`max_targets` must be greater than 0, got 0"),
        ({"max_targets": 2.5}, TypeError, "`max_targets` must be a whole number, got 2.5"),
        ({"activation": "relu"}, ValueError, "`activation` must be one of 'sigmoid', 'softmax', got 'relu'"),
        ({"class_map": [0, 1]}, ValueError, "`class_map` must have one entry for each of the 4 teacher classes"),
        ({"teacher_logits": torch.zeros(3, 4)}, ValueError, "`teacher_logits` and `teacher_boxes` must have the same"),
        (
            {"teacher_logits": torch.zeros(1, 2, 1), "teacher_boxes": torch.zeros(1, 2, 4), "activation": "softmax"},
            ValueError,
            r"`teacher_logits` must have shape .* with a class beside 'no object', got \(1, 2, 1\) and a softmax head",
        ),
    ],
)
def test_errors(options, error, message):
    logits, boxes = predictions(0)
    with pytest.raises(error, match=message):
        dkl.pseudo_targets(
            **{"teacher_logits": logits, "teacher_boxes": boxes, "threshold": 0.5, "max_targets": 3, **options}
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t, p: (t, p, {"max_iou": -1}), ValueError, r"`max_iou` must be in \[0, 1\], got -1"),
        (lambda t, p: (tuple(t), p, {}), TypeError, "`targets` must be a Targets, got tuple"),
        (lambda t, p: (t, p._replace(mask=p.mask[:, 1:]), {}), ValueError, "`target_labels` and `target_mask` must"),
        (lambda t, p: (t, dkl.Targets(*(x[1:] for x in p)), {}), ValueError, "`targets` and `pseudo` must have the"),
    ],
)
def test_errors_of_adding(change, error, message):
    targets, pseudo, options = change(of_images(0, 2), of_images(1, 3))
    with pytest.raises(error, match=message):
        dkl.add_pseudo_targets(targets, pseudo, **options)
