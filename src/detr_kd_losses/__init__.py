"""Distillation losses for DETR detectors, on plain tensors, with batched Hungarian matching."""

from detr_kd_losses.assignment import linear_sum_assignment, select_backend
from detr_kd_losses.boxes import (
    box_area,
    box_cxcywh_to_xyxy,
    box_iou,
    box_xyxy_to_cxcywh,
    generalized_box_iou,
    paired_box_iou,
    paired_generalized_box_iou,
)
from detr_kd_losses.costs import detection_cost, distillation_cost
from detr_kd_losses.criterion import DETRDistillationLoss
from detr_kd_losses.heads import Heads, map_class_logits
from detr_kd_losses.losses.box_distributions.bins import rebin_box_distribution
from detr_kd_losses.losses.box_distributions.loss import BoxDistributionLoss, box_distribution_loss
from detr_kd_losses.losses.detection import DetectionLoss, detection_loss
from detr_kd_losses.losses.features.levels import box_mask
from detr_kd_losses.losses.features.loss import TargetAwareFeatureLoss, target_aware_feature_loss
from detr_kd_losses.losses.features.mask import target_aware_mask
from detr_kd_losses.losses.features.plain import FeatureDistillationLoss, feature_distillation_loss
from detr_kd_losses.losses.features.projection import FeatureProjection
from detr_kd_losses.losses.features.quality import query_quality
from detr_kd_losses.losses.logits import HungarianDistillationLoss, hungarian_distillation_loss
from detr_kd_losses.losses.masks import MaskDistillationLoss, mask_distillation_loss
from detr_kd_losses.losses.query_group import (
    TeacherAssignedQueryLoss,
    query_group_attention_mask,
    teacher_assigned_query_loss,
)
from detr_kd_losses.losses.shared_queries import SharedQueryDistillationLoss, shared_query_distillation_loss
from detr_kd_losses.matching import match_targets, match_teacher
from detr_kd_losses.outputs import BoxDistributions, DetectorOutput, Predictions, Targets, pad_targets
from detr_kd_losses.pairs import assignment_to_indices, invert_assignment, match_through_targets
from detr_kd_losses.stages import select_stages
from detr_kd_losses.step import Step, TargetMatching
from detr_kd_losses.term import Term
from detr_kd_losses.terms.box_distributions import BoxDistributionTerm
from detr_kd_losses.terms.features import FeatureTerm
from detr_kd_losses.terms.logits import LogitsTerm
from detr_kd_losses.terms.masks import MaskTerm
from detr_kd_losses.terms.plain_features import PlainFeatureTerm
from detr_kd_losses.terms.query_group import QueryGroupTerm
from detr_kd_losses.terms.shared_queries import SharedQueryTerm
from detr_kd_losses.training.controller import ShareController, TermShare
from detr_kd_losses.training.diagnostics import (
    LossMagnitude,
    assignment_instability,
    loss_magnitudes,
    matched_iou,
    mean_quality,
    positives_per_image,
)
from detr_kd_losses.training.geometry import Geometry
from detr_kd_losses.training.inheritance import Inheritance, inherit_weights
from detr_kd_losses.training.offline import OfflineTeacher
from detr_kd_losses.training.pseudo_targets import add_pseudo_targets, pseudo_targets
from detr_kd_losses.training.saving import PredictionWriter, save_predictions
from detr_kd_losses.training.schedules import WeightSchedule, cosine_decay, linear_warmup, stop_after
from detr_kd_losses.training.teacher import FrozenTeacher
from detr_kd_losses.training.value_checks import check_finite, check_targets
from detr_kd_losses.weights import best_queries, confidence_weight, localization_weight, overlap_weight

__version__ = "0.1.0"

__all__ = [
    "BoxDistributionLoss",
    "BoxDistributionTerm",
    "BoxDistributions",
    "DETRDistillationLoss",
    "DetectionLoss",
    "DetectorOutput",
    "FeatureDistillationLoss",
    "FeatureProjection",
    "FeatureTerm",
    "FrozenTeacher",
    "Geometry",
    "Heads",
    "HungarianDistillationLoss",
    "Inheritance",
    "LogitsTerm",
    "LossMagnitude",
    "MaskDistillationLoss",
    "MaskTerm",
    "OfflineTeacher",
    "PlainFeatureTerm",
    "PredictionWriter",
    "Predictions",
    "QueryGroupTerm",
    "ShareController",
    "SharedQueryDistillationLoss",
    "SharedQueryTerm",
    "Step",
    "TargetAwareFeatureLoss",
    "TargetMatching",
    "Targets",
    "TeacherAssignedQueryLoss",
    "Term",
    "TermShare",
    "WeightSchedule",
    "add_pseudo_targets",
    "assignment_instability",
    "assignment_to_indices",
    "best_queries",
    "box_area",
    "box_cxcywh_to_xyxy",
    "box_distribution_loss",
    "box_iou",
    "box_mask",
    "box_xyxy_to_cxcywh",
    "check_finite",
    "check_targets",
    "confidence_weight",
    "cosine_decay",
    "detection_cost",
    "detection_loss",
    "distillation_cost",
    "feature_distillation_loss",
    "generalized_box_iou",
    "hungarian_distillation_loss",
    "inherit_weights",
    "invert_assignment",
    "linear_sum_assignment",
    "linear_warmup",
    "localization_weight",
    "loss_magnitudes",
    "map_class_logits",
    "mask_distillation_loss",
    "match_targets",
    "match_teacher",
    "match_through_targets",
    "matched_iou",
    "mean_quality",
    "overlap_weight",
    "pad_targets",
    "paired_box_iou",
    "paired_generalized_box_iou",
    "positives_per_image",
    "pseudo_targets",
    "query_group_attention_mask",
    "query_quality",
    "rebin_box_distribution",
    "save_predictions",
    "select_backend",
    "select_stages",
    "shared_query_distillation_loss",
    "stop_after",
    "target_aware_feature_loss",
    "target_aware_mask",
    "teacher_assigned_query_loss",
]
