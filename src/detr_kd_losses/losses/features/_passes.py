"""The two passes over the feature maps that the feature loss takes: one forward, one backward.

Whatever else the loss computes has one number per cell. On a GPU each pass is one Triton kernel, which reads every
feature once; on a CPU it goes block by block; a compiler gets plain operations to fuse.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr_kd_losses._blocks import FEATURES_COMPARED, in_blocks, slices
from detr_kd_losses._gpu import is_wrapped, why_no_triton
from detr_kd_losses._precision import full_precision_matmul, shared_precision
from detr_kd_losses.losses.features._similarity import Kind, QuerySummary, similarities

__all__: list[str] = []

_MIN_CAPABILITY = (8, 0)


class Comparison(NamedTuple):
    """What one pass over the features of student and teacher, (B, D, H, W) each, says of every cell.

    Attributes:
        distance: (B, H*W), squared distance of student and teacher; 0 in cells that are not valid.
        square: (B, H*W), squared length of the teacher's feature.
        similarity: (L, B, H*W), see :func:`similarities`.
    """

    distance: Tensor
    square: Tensor
    similarity: Tensor


def compare(student: Tensor, teacher: Tensor, valid: Tensor | None, summary: QuerySummary) -> Comparison:
    """Compare features (B, D, H, W) cell by cell. The distance has a gradient for the student.

    Whatever is in cells that are not `valid` (B, H, W), NaN included, stays out of distance and gradient.
    """
    return Comparison(*_Comparison.apply(student, _savable(teacher), _savable(valid), *summary))  # type: ignore[no-untyped-call]


class _Comparison(torch.autograd.Function):
    """Keeps nothing for the backward pass but its inputs."""

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, valid: Tensor | None, kind: Kind, rows: Tensor, quality: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        compare_cells = compare_on_cpu
        if not unsupported_reasons(student, teacher, rows):
            from detr_kd_losses.losses.features._kernels import compare_on_gpu as compare_cells  # noqa: PLC0415
        distance, square, similarity = compare_cells(student, teacher, QuerySummary(kind, rows, quality))
        return distance if valid is None else distance.where(valid.flatten(1), 0.0), square, similarity

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        student, teacher, valid = ctx.saved_tensors
        scale_difference = scale_difference_on_cpu
        if not unsupported_reasons(student, teacher, grad):
            from detr_kd_losses.losses.features import _kernels  # noqa: PLC0415

            scale_difference = _kernels.scale_difference_on_gpu
        return scale_difference(student, teacher, valid, 2 * grad), None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """One after the other: neither in-place products nor kernels take more dimensions."""
        each = []
        for index in range(info.batch_size):
            one = (x if dim is None else x.select(dim, index) for x, dim in zip(inputs, in_dims, strict=True))
            each.append(_Comparison.apply(*one))  # type: ignore[no-untyped-call]
        return tuple(torch.stack(outputs) for outputs in zip(*each, strict=True)), (0, 0, 0)


def compare_on_cpu(student: Tensor, teacher: Tensor, summary: QuerySummary) -> Comparison:
    """Compare block by block; directions are multiplied by the block that is in the cache, other rows by all cells."""
    linear = summary.kind == "directions"
    rows = summary.rows.squeeze(-2).transpose(0, 1) if linear else summary.rows.new_zeros((len(teacher), 0, 0))
    student_cells, teacher_cells = student.flatten(2), teacher.flatten(2)
    s, t, r = shared_precision(student_cells[:, :0], teacher_cells[:, :0], rows[..., :0])
    with full_precision_matmul(t):
        distance, square, products = (s - t).sum(1), t.sum(1), r @ t  # zeros, of the right shape and precision
        for channels, cells in _blocks(student_cells):
            block = (slice(None), channels, cells)
            s, t = student_cells[block].to(r.dtype), teacher_cells[block].to(r.dtype)
            distance[:, cells] += (s - t).square_().sum(1)
            square[:, cells] += t.square().sum(1)
            if linear:
                products[..., cells].baddbmm_(rows[..., channels].to(r.dtype), t)
    return Comparison(distance, square, products.transpose(0, 1) if linear else similarities(teacher, summary))


def _blocks(features: Tensor) -> list[tuple[slice, slice]]:
    """Channels and cells of `features` (B, D, cells) to take at a time; what is outer in memory is cut to pieces."""
    batch, channels, cells = features.shape
    if not in_blocks(features):
        return [(slice(None), slice(None))]
    if features.stride(1) < features.stride(2):
        return [(slice(None), part) for part in slices(cells, FEATURES_COMPARED // max(1, batch * channels))]
    return [(part, slice(None)) for part in slices(channels, FEATURES_COMPARED // max(1, batch * cells))]


def scale_difference_on_cpu(student: Tensor, teacher: Tensor, valid: Tensor | None, factor: Tensor) -> Tensor:
    """`factor` (B, H*W) times student minus teacher (B, D, H, W), in the dtype of the student."""
    students, teachers = shared_precision(student, teacher)
    difference, factor = students - teachers, factor.reshape(len(student), 1, *student.shape[2:])
    # In place, for a second map takes longer to allocate than to fill. Many factors at once are larger than one map.
    many = not torch.compiler.is_compiling() and is_wrapped(factor)
    difference = difference * factor if many else difference.mul_(factor)
    if valid is not None:
        difference.masked_fill_(~valid.unsqueeze(1), 0.0)
    return difference.to(student.dtype)


def unsupported_reasons(student: Tensor, teacher: Tensor, *others: Tensor) -> list[str]:
    """Why the kernels cannot take these tensors here and now; empty if they can."""
    if torch.compiler.is_compiling():
        return ["a compiler traces the loss, and fuses plain operations itself"]
    reasons = why_no_triton("features", teacher, capability=_MIN_CAPABILITY)
    if torch.version.hip:
        reasons.append("they need products of three TF32, which ROCm has not")
    if torch.is_grad_enabled():
        reasons.append("the gradient is to be differentiated again, which takes operations that can be")
    if teacher.numel() == 0:
        reasons.append("the features are empty")
    for tensor in (student, teacher, *others):
        if is_wrapped(tensor):
            reasons.append("a transform of torch.func, or a batch of gradients, stands before the memory")
        if tensor.dtype == torch.float64:
            reasons.append("they compute in float32, and a tensor is in float64")
    return list(dict.fromkeys(reasons))


def _savable(tensor: Tensor | None) -> Tensor | None:
    """`tensor` without a graph; a copy of one that was made in inference mode, which autograd refuses to save."""
    if tensor is None:
        return None
    # A compiler cannot trace the question, and does not need the answer.
    copied = not torch.compiler.is_compiling() and tensor.is_inference()
    return tensor.clone() if copied else tensor.detach()
