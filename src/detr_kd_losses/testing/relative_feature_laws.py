"""The laws of a feature loss whose error is relative to the teacher's features.

>>> from functools import partial
>>> import detr_kd_losses as dkl
>>> loss = partial(dkl.target_aware_feature_loss, normalize="max", relative=True)
>>> RELATIVE_FEATURE_LAWS["any_scale"](loss, max_examples=5)
"""

from __future__ import annotations

import torch

from detr_kd_losses.testing import loss_laws as laws
from detr_kd_losses.testing.arguments import Arguments
from detr_kd_losses.testing.law import Function, law, laws_by_name
from detr_kd_losses.testing.makers import feature_arguments
from detr_kd_losses.testing.requirements import add_terms, require_equal
from detr_kd_losses.testing.signatures import FEATURES

__all__ = ["RELATIVE_FEATURE_LAWS"]


@law("any_scale", "the scale of the features of an image does not matter")
def any_scale(loss: Function, arguments: Arguments) -> None:
    factors = 10.0 ** torch.linspace(-3, 2, arguments.size("B")).reshape(-1, 1, 1, 1)
    scaled = {name: factors * arguments[name] for name in ("student_features", "teacher_features")}
    require_equal(arguments.replaced(**scaled).terms(loss), arguments.terms(loss))


@law("blank_student", "a student whose features are 0 has loss 1 in an image, or 0 where no cell of the teacher counts")
def blank_student(loss: Function, arguments: Arguments) -> None:
    blank = arguments.replaced(student_features=torch.zeros_like(arguments["student_features"]))
    for image in range(arguments.size("B")):
        terms = blank.taken("B", [image]).terms(loss)
        require_equal(terms, {name: (term > 0.5).to(term.dtype) for name, term in terms.items()})


@law("stages_repeat", "decoder layers that repeat each other change nothing")
def stages_repeat(loss: Function, arguments: Arguments) -> None:
    stages = list(range(arguments.size("L")))
    require_equal(arguments.taken("L", stages + stages).terms(loss), arguments.terms(loss))


@law("levels_repeat", "levels that repeat each other change nothing")
def levels_repeat(loss: Function, arguments: Arguments) -> None:
    pyramid = arguments.replaced(**{name: [arguments[name]] * 3 for name in arguments.having("W")})
    require_equal(pyramid.terms(loss), arguments.terms(loss))


@law("images_mean", "a batch is the mean of its images")
def images_mean(loss: Function, arguments: Arguments) -> None:
    images = [arguments.taken("B", [image]) for image in range(arguments.size("B"))]
    require_equal(
        add_terms((image.terms(loss) for image in images), [1 / len(images)] * len(images)), arguments.terms(loss)
    )


_OF_SUMS = ("images_average", "stages_add", "levels_add")

RELATIVE_FEATURE_LAWS = laws_by_name(
    FEATURES,
    feature_arguments(),
    *(kept for name, kept in laws.FEATURE_LAWS.items() if name not in _OF_SUMS),
    any_scale,
    blank_student,
    stages_repeat,
    levels_repeat,
    images_mean,
)
