"""DistillationTrainer in real runs: RT-DETR to a smaller RT-DETR, and one step of two processes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

pytest.importorskip("transformers", reason="the Hugging Face trainer needs transformers")
pytest.importorskip("accelerate", reason="the Hugging Face trainer needs accelerate")

import transformers

import detr_kd_losses as dkl
from detr_kd_losses.training.schedules import stop_after
from hf_transformers.coco_shapes import CLASSES, CocoDetection, collate, make_shapes
from hf_transformers.train import rt_detr, training_arguments
from hf_transformers.trainer import DistillationTrainer

from support import zoo
from support.two_processes import replica, run_together, step_of_gradient_descent

TERMS = {f"loss_kd_{prefix}{term}" for prefix in ("", "group_") for term in ("class", "bbox", "giou")}
TERMS |= {"loss_kd_feature"}
FAST = {"learning_rate": 1e-3, "max_grad_norm": 1.0}  # for eight images, seen at every step

# The Trainer loads and saves through libraries that warn about themselves.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> CocoDetection:
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes(folder, 8)
    return CocoDetection(folder, side=64)


@pytest.fixture(scope="module")
def teacher(shapes: CocoDetection, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """An RT-DETR that has learned a little by the plain Trainer."""
    torch.manual_seed(0)
    model = rt_detr(width=64, decoder_layers=3, num_queries=24)
    arguments = training_arguments(tmp_path_factory.mktemp("teacher"), steps=60, batch_size=8, **FAST)
    transformers.Trainer(model=model, args=arguments, train_dataset=shapes, data_collator=collate).train()
    return model


def student_trainer(
    teacher: nn.Module, shapes: CocoDetection, output: Path, *, steps: int, options: dict[str, Any] | None = None
) -> DistillationTrainer:
    torch.manual_seed(1)
    student = rt_detr(width=32, decoder_layers=2, num_queries=12)
    arguments = training_arguments(output, steps=steps, batch_size=8, **(options or {}))
    return DistillationTrainer(
        model=student, teacher=teacher, args=arguments, train_dataset=shapes, eval_dataset=shapes, data_collator=collate
    )


def test_data_set_reads_coco(shapes: CocoDetection) -> None:
    example = shapes[0]
    labels, boxes = example["labels"]["class_labels"], example["labels"]["boxes"]
    mask = torch.ones(1, len(labels), dtype=torch.bool)
    dkl.check_targets(labels[None], boxes[None], mask, num_classes=len(CLASSES))
    background = example["pixel_values"][:, 0, 0]
    centre = (boxes[:, :2] * 64).long()
    for x, y in centre:
        assert (example["pixel_values"][:, y, x] - background).abs().max() > 0.1, "a box is where an object is"


@pytest.fixture(scope="module")
def before(teacher: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in teacher.state_dict().items()}


@pytest.fixture(scope="module")
def trainer(
    teacher: nn.Module, before: dict[str, Tensor], shapes: CocoDetection, tmp_path_factory: pytest.TempPathFactory
) -> DistillationTrainer:
    trainer = student_trainer(teacher, shapes, tmp_path_factory.mktemp("student"), steps=60, options=FAST)
    trainer.train()
    return trainer


def test_a_share_of_the_teachers_queries(teacher: nn.Module, shapes: CocoDetection, tmp_path: Path) -> None:
    trainer = student_trainer(teacher, shapes, tmp_path, steps=1)
    trainer.group_share = 1 / 3
    seen = []
    trainer.distillation.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    trainer.train()
    assert seen[0].group.logits.shape[2] == seen[0].group_index.shape[1] == 8


class TestRun:
    """One distillation of 60 steps, looked at from all sides."""

    def test_terms_are_logged_and_fall(self, trainer: DistillationTrainer) -> None:
        logs = [entry for entry in trainer.state.log_history if "loss_kd_class" in entry]
        assert len(logs) == 10
        assert logs[0].keys() >= TERMS
        first, last = ({name: float(entry[name]) for name in TERMS | {"loss"}} for entry in (logs[0], logs[-1]))
        assert last["loss"] < 0.8 * first["loss"]
        for name in ("loss_kd_class", "loss_kd_giou", "loss_kd_feature", "loss_kd_group_class"):
            assert last[name] < 0.9 * first[name], name
        # The boxes of the group start at the teacher's proposals, where little is left to gain.
        assert sum(last[name] for name in TERMS) < 0.8 * sum(first[name] for name in TERMS)

    def test_checkpoint_is_the_student_alone(self, trainer: DistillationTrainer, shapes: CocoDetection) -> None:
        folder = Path(trainer.args.output_dir) / "checkpoint-60"
        reloaded = transformers.RTDetrForObjectDetection.from_pretrained(folder)
        student = trainer.model.eval()
        assert reloaded.state_dict().keys() == rt_detr(width=32, decoder_layers=2, num_queries=12).state_dict().keys()
        images = collate([shapes[0], shapes[1]])["pixel_values"]
        with torch.no_grad():
            assert_close(reloaded.eval()(images).logits, student(images).logits)

    def test_projections_are_learned_beside_the_student(self, trainer: DistillationTrainer) -> None:
        state = torch.load(Path(trainer.args.output_dir) / "checkpoint-60" / "distillation.pt", weights_only=True)
        assert_close(state, dict(trainer.projections.state_dict()))
        shapes = {tuple(tensor.shape) for tensor in state.values()}
        assert shapes == {(64, 32, 1, 1), (64,), (32, 64)}
        weight = trainer.query_projection.maps["content"].weight
        assert (weight @ weight.T - torch.eye(32)).abs().max() > 1e-4, "it has left its orthogonal start"

    def test_teacher_is_left_alone(
        self, trainer: DistillationTrainer, teacher: nn.Module, before: dict[str, Tensor]
    ) -> None:
        assert_close(dict(teacher.state_dict()), before, rtol=0, atol=0)
        assert not teacher.training
        assert (
            not trainer.model.state_dict().keys()
            - rt_detr(width=32, decoder_layers=2, num_queries=12).state_dict().keys()
        )

    def test_evaluation_is_the_plain_loss(self, trainer: DistillationTrainer, shapes: CocoDetection) -> None:
        plain = transformers.Trainer(model=trainer.model, args=trainer.args, eval_dataset=shapes, data_collator=collate)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)

    def test_training_resumes(self, trainer: DistillationTrainer, teacher: nn.Module, shapes: CocoDetection) -> None:
        folder = Path(trainer.args.output_dir)
        resumed = student_trainer(teacher, shapes, folder, steps=62, options=FAST)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-60"))
        assert resumed.state.global_step == 62
        moved = resumed.projections.state_dict()
        for name, saved in torch.load(folder / "checkpoint-60" / "distillation.pt", weights_only=True).items():
            assert (moved[name] - saved).abs().max() < 0.01, "two steps away from where it was"


def test_steps_do_not_leak_into_each_other(teacher: nn.Module, shapes: CocoDetection, tmp_path: Path) -> None:
    """With weights that stand still, the projections have the same gradient at every step, accumulated or not."""
    seen: list[list[Tensor]] = []

    class Record(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            seen.append([parameter.grad.clone() for parameter in trainer.projections.parameters()])

    for accumulation in (1, 2):
        options = {"gradient_accumulation_steps": accumulation, "learning_rate": 0.0, "save_strategy": "no"}
        trainer = student_trainer(teacher, shapes, tmp_path, steps=2, options=options)
        trainer.train_dataset = [shapes[0]] * 64
        trainer.add_callback(Record)
        trainer.train()
    assert len(seen) == 4
    assert all(gradient.any() for gradient in seen[0])
    for other in seen[1:]:
        assert_close(other, seen[0], rtol=1e-3, atol=1e-5)


def test_schedule_stops_the_teacher(teacher: nn.Module, shapes: CocoDetection, tmp_path: Path) -> None:
    trainer = student_trainer(teacher, shapes, tmp_path, steps=4, options={"save_strategy": "no"})
    trainer.schedule = dkl.WeightSchedule(trainer.distillation, partial(stop_after, end=0.5))
    weights = [term.weight for term in trainer.distillation.terms.values()]
    calls = []
    hook = teacher.register_forward_hook(lambda *_: calls.append(trainer.state.global_step))
    trainer.train()
    hook.remove()
    assert calls == [0, 1]
    assert [term.weight for term in trainer.distillation.terms.values()] == weights, "for another training"
    assert [entry["step"] for entry in trainer.state.log_history if "loss_kd_class" in entry] == [1, 2]


def test_mixed_precision(teacher: nn.Module, shapes: CocoDetection, tmp_path: Path) -> None:
    torch.manual_seed(1)
    arguments = training_arguments(tmp_path, steps=2, batch_size=4, bf16=True, save_strategy="no")
    student = rt_detr(width=32, decoder_layers=2, num_queries=12)
    trainer = DistillationTrainer(
        model=student, teacher=teacher, args=arguments, train_dataset=shapes, data_collator=collate
    )
    dtypes = []
    hook = teacher.model.decoder.class_embed[0].register_forward_hook(lambda *call: dtypes.append(call[-1].dtype))
    trainer.train()
    hook.remove()
    assert set(dtypes) == {torch.bfloat16}
    logged = [entry for entry in trainer.state.log_history if "loss_kd_class" in entry]
    assert len(logged) == 2
    assert all(torch.isfinite(torch.tensor(float(entry[name]))) for entry in logged for name in TERMS)


@pytest.mark.parametrize("levels", [[0, 1, 2], None])
def test_levels_are_chosen_or_named_in_the_error(levels: list[int] | None, tmp_path: Path) -> None:
    teacher = zoo.build("deformable", seed=1, width=128, num_feature_levels=3)
    student = zoo.build("deformable")
    arguments = training_arguments(tmp_path, steps=1, batch_size=2)
    trainer = DistillationTrainer(model=student, teacher=teacher, args=arguments, student_levels=levels)
    trainer.state.max_steps = 1
    inputs = {**zoo.images(student), "labels": zoo.labels()}
    if levels:
        assert trainer.compute_loss(student.train(), inputs).isfinite()
    else:
        with pytest.raises(ValueError, match=r"maps of .*\(2, 2\)\] and .* cells; choose .* student_levels"):
            trainer.compute_loss(student.train(), inputs)


@pytest.mark.parametrize("labels", [None, []])
def test_missing_targets(labels: list[Any] | None, teacher: nn.Module, shapes: CocoDetection, tmp_path: Path) -> None:
    trainer = student_trainer(teacher, shapes, tmp_path, steps=1)
    trainer.state.max_steps = 1
    inputs = {"pixel_values": torch.rand(1, 3, 64, 64)} | ({} if labels is None else {"labels": labels})
    with pytest.raises(ValueError, match=r"must have 'labels', .* remove_unused_columns=False"):
        trainer.compute_loss(trainer.model.train(), inputs)


def test_student_as_its_own_teacher(tmp_path: Path) -> None:
    student = rt_detr(width=32, decoder_layers=1, num_queries=4)
    with pytest.raises(ValueError, match=r"another model than the student.*deepcopy"):
        DistillationTrainer(model=student, teacher=student, args=training_arguments(tmp_path, steps=1, batch_size=1))
    assert all(parameter.requires_grad for parameter in student.model.decoder.parameters())


def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    joined = step_of_gradient_descent(tmp_path, world_size=1)
    run_together(replica, tmp_path)
    for rank in range(2):
        step = torch.load(tmp_path / f"replica_{rank}.pt", weights_only=True)
        assert step.keys() == joined.keys()
        for name, expected in joined.items():
            scale = expected.abs().max().item()
            assert_close(
                step[name], expected, rtol=0, atol=1e-5 + 1e-4 * scale, msg=lambda text, name=name: f"{name}: {text}"
            )
    moved = [name for name, step in joined.items() if step.any()]
    assert any(name.startswith("0.terms.feature") for name in moved), "the projection of the features learns"
    assert any(name.startswith("1.maps") for name in moved), "the projection of the queries learns"
