"""The Triton kernels of the feature loss: one reads student and teacher forward, one reads them and writes a gradient.

Both take tiles of channels × cells with any strides, so that maps (B, D, H, W) and rows of a transformer (B, H W, D)
are read as they lie. Everything is computed in float32. A program owns its cells: nothing is added across programs,
results repeat bit by bit, and a NaN stays in its cell.
"""

# Triton's language is not Python's types.
# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl

from detr_kd_losses.losses.features._similarity import QuerySummary

__all__: list[str] = []

# Tiles: enough cells for whole lines of memory, few enough registers for many programs at a time.
_CELLS = 64
_CHANNELS = 32
_MAX_ROWS = {"directions": 128, "queries": 128, "form": 64}


def compare_on_gpu(student, teacher, summary: QuerySummary):
    """Distance (B, cells), squared length (B, cells) and similarity (L, B, cells); see `_passes.Comparison`."""
    student, teacher = student.flatten(2), teacher.flatten(2)
    batch, channels, cells = teacher.shape
    stages, _, num_rows, _ = summary.rows.shape
    distance, square = teacher.new_empty((2, batch, cells), dtype=torch.float32)
    similarity = teacher.new_empty((stages, batch, cells), dtype=torch.float32)
    rows = min(max(16, triton.next_power_of_2(stages * num_rows)), _MAX_ROWS[summary.kind])
    with torch.cuda.device(teacher.get_device()):  # none if -1, the CPU's
        compare_kernel[(triton.cdiv(cells, _CELLS), batch)](
            student,
            teacher,
            summary.rows.contiguous(),
            distance if summary.quality is None else summary.quality.contiguous(),
            distance,
            square,
            similarity,
            *student.stride(),
            *teacher.stride(),
            stages,
            num_rows,
            channels,
            cells,
            KIND=summary.kind,
            STAGES=max(16, triton.next_power_of_2(stages)),
            ROWS=rows,
            CHANNELS=_CHANNELS,
            CELLS=_CELLS,
            num_warps=8 if rows > 16 else 4,
            enable_fp_fusion=True,
        )
    return distance, square, similarity


@triton.jit(do_not_specialize=("stages", "num_rows"))  # numbers of targets change from batch to batch
def compare_kernel(
    student,
    teacher,
    rows,
    quality,
    distance,
    square,
    similarity,
    student_b,
    student_d,
    student_p,
    teacher_b,
    teacher_d,
    teacher_p,
    stages,
    num_rows,
    channels,
    cells,
    KIND: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CELLS: tl.constexpr,
):
    image, batch = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    inside = cell < cells
    student += image * student_b + cell[None, :] * student_p
    teacher += image * teacher_b + cell[None, :] * teacher_p
    stage = tl.arange(0, STAGES)
    distances, squares = tl.zeros((CELLS,), tl.float32), tl.zeros((CELLS,), tl.float32)
    similarities = tl.zeros((STAGES, CELLS), tl.float32)
    # All rows of all stages, ROWS at a time; mostly there is one round, and the features are read once.
    first = tl.full((), 0, tl.int32)
    while first < tl.maximum(stages * num_rows, 1):
        row = first + tl.arange(0, ROWS)
        of_stage, of_query = row // tl.maximum(num_rows, 1), row % tl.maximum(num_rows, 1)
        known = row < stages * num_rows
        at = (of_stage * batch + image) * num_rows + of_query
        unread = cell < tl.where(first == 0, cells, 0)
        products = tl.zeros((ROWS, CELLS), tl.float32)
        begin = 0
        if KIND == "form":
            # Row k is 0 before channel k; the first round starts at 0, and sees all channels.
            begin = tl.multiple_of(tl.where(num_rows % ROWS == 0, first % num_rows, 0), ROWS)
        for start in range(begin, channels, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            within = (channel < channels)[:, None] & inside[None, :]
            t = tl.load(teacher + channel[:, None] * teacher_d, mask=within, other=0).to(tl.float32)
            s = tl.load(student + channel[:, None] * student_d, mask=within & unread[None, :], other=0).to(tl.float32)
            distances += tl.where(unread, tl.sum((s - t) * (s - t), axis=0), 0.0)
            squares += tl.where(unread, tl.sum(t * t, axis=0), 0.0)
            some = known[:, None] & (channel < channels)[None, :]
            part = tl.load(rows + at[:, None] * channels + channel[None, :], mask=some, other=0)
            products = tl.dot(part, t, products, input_precision="tf32x3")
        if KIND == "queries":
            products *= products * tl.load(quality + at, mask=known, other=0)[:, None]
        if KIND == "form":
            # Row k of the form belongs to channel k.
            within = known[:, None] & inside[None, :]
            t = tl.load(teacher + of_query[:, None] * teacher_d, mask=within, other=0)
            products *= t.to(tl.float32)
        is_own = (of_stage[None, :] == stage[:, None]) & known[None, :]
        similarities = tl.dot(is_own.to(tl.float32), products, similarities, input_precision="tf32x3")
        first += ROWS
    tl.store(distance + image * cells + cell, distances, mask=inside)
    tl.store(square + image * cells + cell, squares, mask=inside)
    at = (stage[:, None] * batch + image) * cells + cell[None, :]
    tl.store(similarity + at, similarities, mask=(stage < stages)[:, None] & inside[None, :])


def scale_difference_on_gpu(student, teacher, valid, factor):
    """`factor` (B, H*W) times student minus teacher (B, D, H, W), like the student; 0 in cells that are not valid."""
    students, teachers = student.flatten(2), teacher.flatten(2)
    gradients = torch.empty_like(students)
    batch, channels, cells = students.shape
    valid = factor.new_ones((), dtype=torch.bool).expand(batch, cells) if valid is None else valid.flatten(1)
    grid = triton.cdiv(cells, _CELLS), triton.cdiv(channels, _CHANNELS), batch
    with torch.cuda.device(teacher.get_device()):
        scale_difference_kernel[grid](
            students,
            teachers,
            factor,
            valid,
            gradients,
            *students.stride(),
            *teachers.stride(),
            *factor.stride(),
            *valid.stride(),
            *gradients.stride(),
            channels,
            cells,
            CHANNELS=_CHANNELS,
            CELLS=_CELLS,
            enable_fp_fusion=True,
        )
    return gradients.unflatten(2, student.shape[2:])


@triton.jit
def scale_difference_kernel(
    student,
    teacher,
    factor,
    valid,
    gradient,
    student_b,
    student_d,
    student_p,
    teacher_b,
    teacher_d,
    teacher_p,
    factor_b,
    factor_p,
    valid_b,
    valid_p,
    gradient_b,
    gradient_d,
    gradient_p,
    channels,
    cells,
    CHANNELS: tl.constexpr,
    CELLS: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[:, None]
    inside = cell < cells
    within = (channel < channels) & inside[None, :]
    counts = tl.load(valid + image * valid_b + cell * valid_p, mask=inside, other=0) != 0
    times = tl.load(factor + image * factor_b + cell * factor_p, mask=inside, other=0)
    s = tl.load(student + image * student_b + channel * student_d + cell[None, :] * student_p, mask=within, other=0)
    t = tl.load(teacher + image * teacher_b + channel * teacher_d + cell[None, :] * teacher_p, mask=within, other=0)
    scaled = (s.to(tl.float32) - t.to(tl.float32)) * times[None, :]
    scaled = tl.where(counts[None, :], scaled, 0.0)
    at = image * gradient_b + channel * gradient_d + cell[None, :] * gradient_p
    tl.store(gradient + at, scaled.to(gradient.dtype.element_ty), mask=within)
