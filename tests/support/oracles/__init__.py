"""NumPy float64 oracles of every loss: the equations in plain loops, with exact gradients.

They import nothing from the package under test. Functions have the names, arguments and defaults of the
package's; `value_and_grad` differentiates them with respect to student arrays. Only the overlaps differ:
`box_iou` and `generalized_box_iou` take two single cxcywh boxes, and `pairwise` makes the matrix.
"""

from .autodiff import Var, value_and_grad
from .features import (
    class_scores,
    cosine,
    official_feature_loss,
    query_quality,
    target_aware_feature_loss,
    target_aware_mask,
)
from .geometry import (
    box_iou,
    check_assignment,
    check_teacher_assignment,
    generalized_box_iou,
    l1_distance,
    optimal_cost,
    pairwise,
    rows_of_positives,
)
from .losses import (
    class_cross_entropy,
    class_entropy,
    detection_cost,
    detection_loss,
    distillation_cost,
    focal_class_cost,
    hungarian_distillation_loss,
    location_cost,
    official_logits_loss,
    softmax_class_cost,
    teacher_assigned_query_loss,
    teacher_scores,
)

__all__ = [
    "Var",
    "box_iou",
    "check_assignment",
    "check_teacher_assignment",
    "class_cross_entropy",
    "class_entropy",
    "class_scores",
    "cosine",
    "detection_cost",
    "detection_loss",
    "distillation_cost",
    "focal_class_cost",
    "generalized_box_iou",
    "hungarian_distillation_loss",
    "l1_distance",
    "location_cost",
    "official_feature_loss",
    "official_logits_loss",
    "optimal_cost",
    "pairwise",
    "query_quality",
    "rows_of_positives",
    "softmax_class_cost",
    "target_aware_feature_loss",
    "target_aware_mask",
    "teacher_assigned_query_loss",
    "teacher_scores",
    "value_and_grad",
]
