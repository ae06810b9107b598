"""Faults in the feature loss and in the quality of queries."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

import detr_kd_losses as dkl
from detr_kd_losses import boxes as cells_of_boxes
from detr_kd_losses import testing
from detr_kd_losses.losses.features import _passes, _similarity, loss, quality
from detr_kd_losses.losses.features import plain as plain_features
from detr_kd_losses.testing.makers import make_detection_arguments, make_feature_arguments
from detr_kd_losses.testing.plain_feature_laws import make_plain_feature_arguments

from support import cases, oracles
from support.mutants.mutant import faults, law, law_of, oracle

DETECTION = make_detection_arguments(queries=6, targets=4, at_least=2, stages=2, images=2, classes=3)
FEATURES = make_feature_arguments(stages=2, images=2, queries=5, channels=4, height=3, width=4, padded=True)

feature = law_of(dkl.target_aware_feature_loss)
relative = partial(law, testing.RELATIVE_FEATURE_LAWS, dkl.target_aware_feature_loss, relative=True)

plain = law_of(dkl.feature_distillation_loss)
PLAIN = make_plain_feature_arguments(images=2, channels=4, height=3, width=4, padded=True, weighted=True)


def plain_value(distance, *without, **options):
    return oracle("feature_distillation_loss", PLAIN.without(*without), distance=distance, **options)


def touched_cells(max_examples):
    """Boxes over several cells, in one cell, and padding."""
    rng = np.random.default_rng(0)
    boxes = np.concatenate((cases.random_boxes(rng, 2, 3), [[[0.3, 0.6, 0.01, 0.02]]] * 2), axis=1)
    mask = np.array([[True, False, False, True], [False, True, False, False]])
    expected = oracles.box_mask(boxes, mask, (5, 7))
    assert dkl.box_mask(torch.tensor(boxes), torch.tensor(mask), (5, 7)).tolist() == expected.tolist()


MUTANTS = [
    *faults(
        dkl.feature_distillation_loss,
        ("plain levels averaged", "in means]).sum()", "in means]).mean()", plain("levels_add")),
        ("plain cells of each replica", "counts, sync=sync_normalizer", "counts, sync=False", plain("replicas")),
    ),
    *faults(
        plain_features._compare,
        ("padding cells count in plain features", "valid.sum()", "torch.ones_like(valid).sum()", plain("cell_padding")),
        (
            "the teacher of plain features keeps its graph",
            "level.teacher.detach()",
            "level.teacher",
            plain("teacher_detached"),
        ),
        ("a whole of the squares", "(2 * channels)", "channels", plain_value("pearson")),
        ("a sum over channels", "dim=outer) / channels", "dim=outer)", plain_value("mse")),
    ),
    *faults(
        plain_features._weighted,
        ("cells without weight", "distances if weight is None else", "distances if True else", plain_value("mse")),
    ),
    *faults(
        plain_features._squared,
        (
            "padding has a difference",
            "_blanked(student.to(dtype) - teacher.to(dtype), part)",
            "(student.to(dtype) - teacher.to(dtype))",
            plain("cell_padding"),
        ),
    ),
    *faults(
        plain_features._direction,
        (
            "no direction divides",
            "square > _least_square(square)",
            "square > -1",
            plain("flat_features", distance="cosine"),
        ),
        ("lengths matter", "_inverse_root(square, long)", "1", plain_value("cosine")),
    ),
    *faults(
        plain_features._moments,
        ("no variance divides", "variance > least", "variance > -1", plain("flat_features", distance="pearson")),
        (
            "moments of each replica",
            "sync=sync) / number",
            "sync=False) / number",
            plain("replicas", distance="pearson"),
        ),
    ),
    *faults(
        plain_features._sum,
        ("padding has a mean", "_blanked(features, valid)", "features", plain("cell_padding", distance="pearson")),
    ),
    *faults(
        plain_features._divergence,
        ("the student teaches", "log_p.exp()", "log_q.exp()", plain_value("channel", "weight")),
        (
            "temperature of channels unsquared",
            "temperature**2",
            "temperature",
            plain_value("channel", "weight", temperature=3.0),
        ),
    ),
    *faults(
        plain_features._log_share,
        (
            "padding has a share",
            "features if valid is None else",
            "features if True else",
            plain_value("channel", "weight"),
        ),
    ),
    *faults(dkl.box_mask, ("boxes of padding", "rows & mask.unsqueeze(-1)", "rows", touched_cells)),
    *faults(
        cells_of_boxes.touched_cells,
        (
            "cells of whole coverage",
            "start.unsqueeze(-1) < edges[1:]",
            "start.unsqueeze(-1) < edges[:-1]",
            touched_cells,
        ),
    ),
    *faults(
        loss.target_aware_feature_loss,
        ("cells of each replica", "replica_means(*counts, sync=sync_normalizer)", "counts", feature("replicas")),
        ("images of each replica", "replica_means(*counts, sync=sync_normalizer)", "counts", relative("replicas")),
        ("levels averaged", "in each]).sum()", "in each]).mean()", feature("levels_add")),
        ("ratios added", "strict=True)]).mean()", "strict=True)]).sum()", relative("levels_repeat")),
        ("padding cells count", "cells.sum()", "torch.ones_like(cells).sum()", feature("cell_padding")),
        ("images added", "weight.shape[0] if relative", "1 if relative", relative("images_mean")),
    ),
    *faults(
        loss._relative,
        ("padding has features", "if valid is None else", "if True else", relative("cell_padding")),
        ("teacher unweighted", "(weight *", "(torch.ones_like(weight) *", relative("blank_student")),
        ("natural logarithm", "/ math.log(2)", "/ 1.0", relative("blank_student")),
    ),
    *faults(
        loss._loss_weight,
        ("stages averaged", "else weight).sum(0)", "else weight).mean(0)", feature("stages_add", normalize="mean")),
        (
            "official mask not squared",
            "weight.square() if",
            "weight if",
            oracle("target_aware_feature_loss", FEATURES, variant="official"),
        ),
    ),
    *faults(_passes._Comparison.backward, ("half a gradient", "2 * grad", "grad", feature("gradients"))),
    *faults(
        _passes._Comparison.forward,
        ("padding has a distance", "if valid is None else", "if True else", feature("cell_padding")),
    ),
    *faults(
        _passes.scale_difference_on_cpu,
        ("padding has a gradient", "if valid is not None", "if False", feature("cell_padding")),
    ),
    *faults(
        _similarity.summarize_queries,
        (
            "queries unnormalised",
            "1 / length, 0.0",
            "1.0, 0.0",
            oracle("target_aware_feature_loss", FEATURES),
        ),
        (
            "entries beside the diagonal once",
            "part.triu() + part.triu(1)",
            "part.triu()",
            oracle("target_aware_feature_loss", FEATURES),
        ),
    ),
    *faults(
        dkl.query_quality,
        (
            "unmatched queries have a quality",
            "torch.where(matched, ",
            "torch.where(matched | True, ",
            oracle("query_quality", DETECTION),
        ),
    ),
    *faults(
        quality._best_iou,
        ("quality of the worst IoU", ".amax(-1)", ".amin(-1)", oracle("query_quality", DETECTION, variant="official")),
    ),
]
