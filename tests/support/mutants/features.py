"""Faults in the feature loss and in the quality of queries."""

from __future__ import annotations

import detr_kd_losses as dkl
from detr_kd_losses.losses.features import _passes, _similarity, loss, quality
from detr_kd_losses.testing.makers import make_detection_arguments, make_feature_arguments

from support.mutants.mutant import faults, law_of, oracle

DETECTION = make_detection_arguments(queries=6, targets=4, at_least=2, stages=2, images=2, classes=3)
FEATURES = make_feature_arguments(stages=2, images=2, queries=5, channels=4, height=3, width=4, padded=True)

feature = law_of(dkl.target_aware_feature_loss)

MUTANTS = [
    *faults(
        loss.target_aware_feature_loss,
        ("padding cells count", "cells.sum()", "torch.ones_like(cells).sum()", feature("cell_padding")),
        ("cells of each replica", "sync=sync_normalizer", "sync=False", feature("replicas")),
        ("levels averaged", "torch.stack(losses).sum()", "torch.stack(losses).mean()", feature("levels_add")),
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
