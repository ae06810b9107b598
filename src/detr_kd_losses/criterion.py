"""A distillation as a whole: outputs of student and teacher in, a dict of losses out, term by term."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from detr_kd_losses._options import HEADS, OptionModule
from detr_kd_losses._validation import validate_record, validate_type
from detr_kd_losses.heads import Activation, ClassMap, Heads
from detr_kd_losses.outputs import DetectorOutput, Targets
from detr_kd_losses.presets import Preset, preset_terms
from detr_kd_losses.step import Step, TargetMatching
from detr_kd_losses.term import Term

__all__ = ["DETRDistillationLoss"]


class DETRDistillationLoss(OptionModule):
    r"""Distil a large DETR into a small one: a sum of terms, to be added to the student's own detection loss.

    .. math:: L = \sum_t w_t L_t

    What terms share is computed once in each step: the teacher is matched to the targets, layer by layer, and that
    assignment says which of its queries are positive, how good they are, and what the query group learns. A term
    applies where the outputs carry what it needs (``features`` of both and ``queries`` of the teacher, ``group`` of the
    student); one side without the other is an error. :attr:`names` lists what all terms together may return.

    Presets are lists of terms. ``"paper"``, the default, has the paper's losses, that of features relative to the
    teacher's: ``[LogitsTerm(), FeatureTerm(), QueryGroupTerm()]``. ``"official"`` follows the paper's public code, but
    with the teacher's real assignment: ``[LogitsTerm(matching="joint"), FeatureTerm(weight=20.0,
    variant="official", relative=False), QueryGroupTerm()]``. ``"recommended"`` is what did best in our experiments,
    ``[FeatureTerm(weight=60.0)]`` whose weight falls along a :class:`WeightSchedule`; in a short training the student
    may begin with its teacher's decoder (:func:`inherit_weights`).
    Options are attributes, in force as soon as they are set: ``criterion.terms["feature"].weight = 5.0``. Weights are
    constant until you change them; in a long training let them fall (:class:`WeightSchedule`).

    Args:
        terms: The name of a preset; terms; or terms by name, where two are of the same kind.
        student_activation: Head of the student: ``"sigmoid"``, or ``"softmax"`` with "no object" last.
        teacher_activation: Head of the teacher.
        class_map: Student class of each teacher class, -1 = dropped (:func:`map_class_logits`). Targets of a class
            that the teacher does not know have no part in what it teaches.
        teacher_matching: How the teacher is matched to the targets.
        student_matching: How the student is matched to the targets, for terms that ask for it.

    Raises:
        ValueError: If a preset or an option is unknown, or two terms have a name in common.
        TypeError: If a term is not a :class:`Term`.

    Examples:
        >>> from detr_kd_losses import LogitsTerm
        >>> targets = Targets(torch.tensor([[1], [0]]), torch.rand(2, 1, 4), torch.tensor([[True], [False]]))
        >>> teacher = DetectorOutput(torch.randn(6, 2, 9, 3), torch.rand(6, 2, 9, 4))
        >>> student = DetectorOutput(torch.randn(3, 2, 5, 3, requires_grad=True), torch.rand(3, 2, 5, 4))
        >>> criterion = DETRDistillationLoss([LogitsTerm(temperature=2.0)])
        >>> losses = criterion(student, teacher, targets)
        >>> sorted(losses)
        ['loss_kd_bbox', 'loss_kd_class', 'loss_kd_giou']
        >>> sum(losses.values()).backward()

    References:
        Chang et al., "DETRDistill: A Universal Knowledge Distillation Framework for DETR-families", ICCV 2023,
        arXiv:2211.10156.
    """

    rules = HEADS
    terms: nn.ModuleDict

    def __init__(
        self,
        terms: Preset | Iterable[Term] | Mapping[str, Term] = "paper",
        *,
        student_activation: Activation = "sigmoid",
        teacher_activation: Activation = "sigmoid",
        class_map: ClassMap | None = None,
        teacher_matching: TargetMatching | None = None,
        student_matching: TargetMatching | None = None,
    ) -> None:
        super().__init__(
            student_activation=student_activation, teacher_activation=teacher_activation, class_map=class_map
        )
        self.terms = nn.ModuleDict(_by_name(terms))
        self.teacher_matching = TargetMatching() if teacher_matching is None else teacher_matching
        self.student_matching = TargetMatching() if student_matching is None else student_matching
        self._validate_heads(self.heads)

    @property
    def heads(self) -> Heads:
        """The heads of student and teacher."""
        return Heads(self.student_activation, self.teacher_activation, self.class_map)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the losses, known before the first step: those that a filter of losses has to let through."""
        return tuple(name for term in self._all_terms() for name in term.names)

    @property
    def needs(self) -> frozenset[str]:
        """The fields of :class:`DetectorOutput` that terms use, beside logits and boxes: what is worth computing."""
        return frozenset(field for term in self._all_terms() if term.weight != 0 for field in term.needs)

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> dict[str, Tensor]:
        """Compute the terms, already weighted.

        Args:
            student: The student's outputs, with L_S layers and N queries.
            teacher: The teacher's outputs, with L_T layers and M queries, of the same images.
            targets: Padded targets of the batch.

        Returns:
            Scalars by name, those of the terms that apply. A term of weight 0 gives 0, and so does a term that does not
            apply where it has parameters. In several processes all must call this in a step with gradients; without
            gradients, or in evaluation mode, one may call it alone.

        Raises:
            ValueError: If shapes or devices do not fit, or one side lacks what the other has.
            TypeError: If an argument is not the record that it should be, or a dtype does not fit.
        """
        step = Step(
            student,
            teacher,
            targets,
            heads=self.heads,
            teacher_matching=self.teacher_matching,
            student_matching=self.student_matching,
        )
        losses: dict[str, Tensor] = {}
        for term in self._all_terms():
            own = term(step)
            _validate_names([*losses, *own])  # a prefix may have been set since
            losses.update(own)
        return losses

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an option; heads must fit all terms."""
        if name in HEADS and "terms" in self._modules:
            self._validate_heads(Heads(*({**self.options, name: value}).values()))
        super().__setattr__(name, value)

    def _all_terms(self) -> list[Term]:
        return list(self.terms.values())  # type: ignore[arg-type]

    def _validate_heads(self, heads: Heads) -> None:
        for term in self._all_terms():
            term.validate_heads(heads)


def _by_name(terms: Preset | Iterable[Term] | Mapping[str, Term]) -> dict[str, Term]:
    """Terms by name: ``LogitsTerm`` is ``"logits"``, ``QueryGroupTerm`` ``"query_group"``."""
    if isinstance(terms, str):
        terms = preset_terms(terms)
    if not isinstance(terms, Mapping):
        validate_type("terms", terms, Iterable, "the name of a preset, terms, or terms by name")
        terms = list(terms)
        names = [re.sub("(?<!^)(?=[A-Z])", "_", type(term).__name__.removesuffix("Term")).lower() for term in terms]
        if len(set(names)) < len(names):
            msg = f"`terms` must be a mapping by name where two are of the same kind, got {names}"
            raise ValueError(msg)
        terms = dict(zip(names, terms, strict=True))
    for name, term in terms.items():
        validate_record(f"terms[{name!r}]", term, Term, "LogitsTerm() or another term")
    _validate_names([name for term in terms.values() for name in term.names])
    return dict(terms)


def _validate_names(names: list[str]) -> None:
    """Raise unless all losses have different names: one would replace the other."""
    twice = [name for index, name in enumerate(names) if name in names[:index]]  # PyTorch 2.6 cannot trace list.count
    if twice:
        msg = f"`terms` must have different names, got {sorted(set(twice))} twice: give one of them another `prefix`"
        raise ValueError(msg)
