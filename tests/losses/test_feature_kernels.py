"""The Triton kernels of the feature loss: in Triton's interpreter, compiled for sm_90, and on CUDA."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from detr_kd_losses import _gpu, target_aware_feature_loss
from detr_kd_losses.losses.features import _passes
from detr_kd_losses.losses.features._similarity import summarize_queries

from support import oracles
from support.tolerances import assert_close

needs_cuda = pytest.mark.skipif(
    find_spec("triton") is None or not torch.cuda.is_available(), reason="needs Triton and a CUDA device"
)
# By their queries: directions, queries themselves in one round or more, forms of one stage or more.
OPTIONS = [
    ({"variant": "official"}, (3, 5)),
    ({"variant": "official"}, (20, 2)),
    ({"variant": "paper"}, (1, 7)),
    ({"variant": "paper"}, (3, 30)),
    ({"variant": "paper", "normalize": "max"}, (3, 20)),
    ({"variant": "paper", "normalize": "max"}, (10, 30)),
    ({"variant": "paper", "normalize": "mean"}, (2, 70)),
    ({"variant": "paper", "normalize": "max"}, (1, 0)),
]
SHAPES = [(2, 40, 7, 11), (1, 64, 8, 9)]
# Of a gradient, relative and absolute; the least number of float16 is 6e-8.
ROUNDING = {torch.float32: (1e-5, 1e-9), torch.bfloat16: (1e-2, 1e-9), torch.float16: (1e-3, 6e-8)}


def make_case(shape, stages_and_queries, *, dtype=torch.float32, padded=False, layout=torch.contiguous_format):
    """Features, queries, qualities, and a mask outside of which the features are no numbers."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, *size = shape
    student, teacher = (torch.randn(shape, generator=generator) for _ in range(2))
    valid = torch.rand(batch, *size, generator=generator) < 0.7 if padded else None
    if padded:
        student, teacher = (features.masked_fill(~valid.unsqueeze(1), torch.nan) for features in (student, teacher))
    student, teacher = (features.to(dtype).contiguous(memory_format=layout) for features in (student, teacher))
    stages, queries = stages_and_queries
    of_queries = (
        torch.randn(stages, batch, queries, channels, generator=generator),
        torch.rand(stages, batch, queries, generator=generator),
    )
    return student, teacher, *of_queries, valid


def loss_and_gradient(student, teacher, queries, quality, valid, **options):
    """Both, and how often each kernel was launched."""
    launches = count_launches() if find_spec("triton") else {}
    student = student.detach().requires_grad_()
    loss = target_aware_feature_loss(student, teacher, queries, quality, padding_mask=valid, **options)
    loss.backward()
    return loss.detach(), student.grad, launches


def count_launches():
    from detr_kd_losses.losses.features import _kernels

    launches = dict.fromkeys(("compare_on_gpu", "scale_difference_on_gpu"), 0)

    def counted(name, function):
        def call(*arguments):
            launches[name] += 1
            return function(*arguments)

        call.uncounted = function
        return call

    for name in launches:
        function = getattr(_kernels, name)
        setattr(_kernels, name, counted(name, getattr(function, "uncounted", function)))
    return launches


def assert_same(case, dtype, by_kernels, **options):
    """Value and gradient are those of the oracle, on the rounded features, and of the operations without kernels."""
    loss, gradient, launches = by_kernels
    assert launches == {"compare_on_gpu": 1, "scale_difference_on_gpu": 1}
    expected_loss, expected_gradient, _ = loss_and_gradient(*case, **options)
    rtol, atol = ROUNDING[dtype]
    torch.testing.assert_close(loss.cpu(), expected_loss)
    torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=rtol, atol=atol)
    assert gradient.dtype == dtype
    numbers = [tensor.double().numpy() for tensor in case[:4]]
    mask = None if case[4] is None else case[4].numpy()
    assert_close(loss.cpu(), oracles.target_aware_feature_loss(*numbers, padding_mask=mask, **options))


@pytest.mark.parametrize(("options", "stages_and_queries"), OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_plain_operations(shape, options, stages_and_queries, interpreter):
    case = make_case(shape, stages_and_queries)
    by_kernels = interpreter.submit(loss_and_gradient, *case, **options).result(timeout=300)
    assert_same(case, torch.float32, by_kernels, **options)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("variant", ["official", "paper"])
def test_equals_plain_operations_in_any_layout_beside_numbers_that_are_none(variant, layout, dtype, interpreter):
    case = make_case(SHAPES[0], (2, 6), dtype=dtype, padded=True, layout=layout)
    by_kernels = interpreter.submit(loss_and_gradient, *case, variant=variant).result(timeout=300)
    assert_same(case, dtype, by_kernels, variant=variant)
    assert by_kernels[1].stride() == case[0].stride()


def test_cells_that_do_not_lie_in_rows(interpreter):
    """Columns first: cells cannot be flattened without a copy, and the gradient must not be lost in it."""
    student, teacher, *others = make_case(SHAPES[0], (2, 6))
    student, teacher = (features.mT.contiguous().mT for features in (student, teacher))
    by_kernels = interpreter.submit(loss_and_gradient, student, teacher, *others).result(timeout=300)
    assert_same((student, teacher, *others), torch.float32, by_kernels)


def gradient_by_kernels_when_differentiated_again(student, teacher, queries, quality, valid):
    launches = count_launches()
    student = student.detach().requires_grad_()
    loss = target_aware_feature_loss(student, teacher, queries, quality, padding_mask=valid)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), student)
    return second, launches


def test_a_gradient_is_differentiable(interpreter):
    """The kernel has none: a gradient that is to be differentiated again is computed without it."""
    case = make_case(SHAPES[0], (2, 6))
    second, launches = interpreter.submit(gradient_by_kernels_when_differentiated_again, *case).result(timeout=300)
    assert launches == {"compare_on_gpu": 1, "scale_difference_on_gpu": 0}
    expected, _ = gradient_by_kernels_when_differentiated_again(*case)
    torch.testing.assert_close(second, expected)
    assert second.abs().max() > 0


@pytest.mark.parametrize(
    "case",
    [
        [tensor if tensor is None else tensor.double() for tensor in make_case(SHAPES[0], (2, 6))],
        [features[:, :, :0] for features in make_case(SHAPES[0], (2, 6))[:2]] + list(make_case(SHAPES[0], (2, 6))[2:]),
    ],
    ids=["float64", "no cells"],
)
def test_what_the_kernels_leave_to_plain_operations(case, interpreter):
    loss, gradient, launches = interpreter.submit(loss_and_gradient, *case).result(timeout=300)
    assert launches == {"compare_on_gpu": 0, "scale_difference_on_gpu": 0}
    expected_loss, expected_gradient, _ = loss_and_gradient(*case)
    torch.testing.assert_close((loss, gradient), (expected_loss, expected_gradient))


def vmapped(students, teacher, queries, quality):
    launches = count_launches()

    def loss(student):
        return target_aware_feature_loss(student, teacher, queries, quality)

    losses = torch.func.vmap(loss)(students)
    return losses, torch.func.vmap(torch.func.grad(loss))(students), launches["compare_on_gpu"]


def test_vmap_over_students(interpreter):
    student, *others, _ = make_case(SHAPES[0], (2, 6))
    students = torch.stack([student, student + 1, 2 * student])
    losses, gradients, launches = interpreter.submit(vmapped, students, *others).result(timeout=300)
    assert launches == 6
    expected_losses, expected_gradients, _ = vmapped(students, *others)
    torch.testing.assert_close((losses, gradients), (expected_losses, expected_gradients))


def batched_gradients(student, teacher, queries, quality):
    launches = count_launches()
    student = student.detach().requires_grad_()
    loss = target_aware_feature_loss(student, teacher, queries, quality)
    return torch.autograd.grad(loss, student, torch.tensor([1.0, 2.0]), is_grads_batched=True)[0], launches


def test_a_batch_of_gradients(interpreter):
    case = make_case(SHAPES[0], (2, 6))
    gradients, launches = interpreter.submit(batched_gradients, *case[:4]).result(timeout=300)
    assert launches == {"compare_on_gpu": 1, "scale_difference_on_gpu": 0}
    _, expected, _ = loss_and_gradient(*case)
    torch.testing.assert_close(gradients, torch.stack([expected, 2 * expected]))


def launch(dtype, layout, summary):
    from detr_kd_losses.losses.features._kernels import compare_on_gpu, scale_difference_on_gpu

    features = torch.empty(2, 256, 50, 84, dtype=dtype).contiguous(memory_format=layout)
    compare_on_gpu(features, features, summary)
    scale_difference_on_gpu(features, features, None, torch.empty(2, 50 * 84))


def test_no_register_is_spilled(compiler):
    from detr_kd_losses.losses.features import _kernels

    kernels = [compiler.watch(getattr(_kernels, name)) for name in ("compare_kernel", "scale_difference_kernel")]
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            for variant, queries in (("official", 300), ("paper", 2), ("paper", 10), ("paper", 300)):
                of_queries = torch.empty(6, 2, queries, 256), torch.empty(6, 2, queries)
                launch(dtype, layout, summarize_queries(*of_queries, variant))
    for kernel, count in zip(kernels, (16, 4), strict=True):
        memory = compiler.memory_of_registers(kernel)
        assert 0 < len(memory) <= count  # which arguments share a compilation differs between versions
        # The assembler that Triton 3.8 brings lays eight registers of one variant in the stack.
        most = 32 if _gpu.triton_version() == (3, 8) else 0
        assert all(each["STACK"] <= most and each["LOCAL"] == 0 for each in memory)


def test_the_number_of_targets_does_not_matter_to_the_compiler(compiler):
    from detr_kd_losses.losses.features import _kernels

    kernel = compiler.watch(_kernels.compare_kernel)
    compiler.watch(_kernels.scale_difference_kernel)
    for queries in (9, 10, 11, 16):
        summary = summarize_queries(torch.empty(6, 2, queries, 256), torch.empty(6, 2, queries), "paper")
        launch(torch.float32, torch.contiguous_format, summary)
    assert len(compiler.compiled(kernel)) == 2  # up to 64 rows of 6 stages, and more


def test_the_package_does_not_launch_on_a_cpu():
    case = make_case(SHAPES[0], (2, 6))
    assert _passes.unsupported_reasons(*case[:3])


@needs_cuda
@pytest.mark.parametrize(("options", "stages_and_queries"), OPTIONS, ids=str)
class TestCUDA:
    @pytest.mark.parametrize("dtype", ROUNDING)
    def test_equals_plain_operations(self, dtype, options, stages_and_queries):
        for layout in (torch.contiguous_format, torch.channels_last):
            case = make_case((2, 96, 21, 33), stages_and_queries, dtype=dtype, padded=True, layout=layout)
            assert_same(case, dtype, loss_and_gradient(*on_gpu(case), **options), **options)

    def test_the_same_in_two_runs(self, options, stages_and_queries):
        case = on_gpu(make_case((2, 96, 21, 33), stages_and_queries))
        first, second = (loss_and_gradient(*case, **options)[:2] for _ in range(2))
        assert first[0].equal(second[0])
        assert first[1].equal(second[1])


def on_gpu(case):
    return [None if tensor is None else tensor.cuda() for tensor in case]
