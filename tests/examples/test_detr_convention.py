"""The adapter for the dict convention: it reads the outputs, leaves everything else alone, and fits the engine."""

from __future__ import annotations

import copy
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_convention.adapter import (
    KEY,
    DetrReader,
    DistillationCriterion,
    Reader,
    attach_teacher,
    learn_projections,
)
from detr_convention.standin import SetCriterion, StandIn, train_one_epoch
from detr_convention.train import NUM_CLASSES, batches

EXACT = {"rtol": 0, "atol": 1e-6}
UNEVEN = 2  # a seed whose first two images have different numbers of objects


def stand_in(seed: int, *, queries: int = 12, layers: int = 3, channels: int = 32) -> StandIn:
    torch.manual_seed(seed)
    model = StandIn(num_classes=NUM_CLASSES, num_queries=queries, layers=layers, channels=channels)
    with torch.no_grad():  # at the scale of a trained model: fresh weights make all queries alike
        for name, parameter in model.named_parameters():
            if name.startswith(("class_embed.weight", "bbox_embed")) and parameter.ndim > 1:
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5)
    return model


def batch(seed: int = 0) -> tuple[Tensor, list[dict[str, Tensor]]]:
    return next(batches(1, seed=seed))


def test_reader_stacks_all_layers_with_the_last_one_last() -> None:
    layers = [
        {"pred_logits": torch.full((2, 3, 4), float(k)), "pred_boxes": torch.full((2, 3, 4), -float(k))}
        for k in range(3)
    ]
    others = {"enc_outputs": layers[0], "interm_outputs": layers[0], "dn_meta": {"output_known_lbs_bboxes": layers[0]}}
    output = Reader(nn.Identity()).output({**layers[-1], "aux_outputs": layers[:-1], **others})
    assert output.logits[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert output.boxes[:, 0, 0, 0].tolist() == [0, -1, -2]
    assert Reader(nn.Identity()).output(layers[-1]).logits.shape == (1, 2, 3, 4)


class TestDetrReader:
    """The full reader, on the stand-in."""

    @pytest.fixture
    def read(self) -> tuple[StandIn, DetrReader, dkl.DetectorOutput]:
        model = stand_in(0).eval()
        reader = DetrReader(model)
        with torch.no_grad():
            outputs = model(batch()[0])
            return model, reader, reader.output(outputs, reader.query_group())

    def test_own_queries_reproduce_the_predictions(self, read: Any) -> None:
        output = read[2]
        assert_close(output.group.logits, output.logits, **EXACT)
        assert_close(output.group.boxes, output.boxes, **EXACT)
        assert output.queries.shape == (3, 4, 12, 32)
        assert output.logits.std(2).amax() > 1e-2, "a test of queries needs queries that differ"

    def test_queries_and_features_are_what_the_heads_and_the_decoder_see(self, read: Any) -> None:
        model, _, output = read
        with torch.no_grad():
            assert_close(model.class_embed(output.queries), output.logits, **EXACT)
            assert_close(output.features, [model.backbone(batch()[0])], **EXACT)

    def test_padding_is_turned_into_validity(self, read: Any) -> None:
        _, reader, output = read
        assert output.padding_mask[0].all()
        padding = torch.zeros(4, 8, 8, dtype=torch.bool)
        padding[1, :, 6:] = True
        reader._options["memory_key_padding_mask"] = padding.flatten(1)
        layer = {"pred_logits": output.logits[-1], "pred_boxes": output.boxes[-1]}
        assert_close(reader.output(layer).padding_mask[0], ~padding)

    def test_group_equals_concatenation_under_a_block_mask(self, read: Any) -> None:
        model, reader, output = read
        teacher = stand_in(1, queries=17).eval()
        teacher_reader = DetrReader(teacher)
        with torch.no_grad():
            teacher(batch()[0])
            group = teacher_reader.query_group()
            layer = {"pred_logits": output.logits[-1], "pred_boxes": output.boxes[-1]}
            replayed = reader.output(layer, group)
            both = torch.cat([reader.query_group()["query_pos"], group["query_pos"]])
            _, memory = reader._arguments
            results = []
            for mask in (dkl.query_group_attention_mask([12, 17]), None):
                options = {**reader._options, "query_pos": both, "tgt_mask": mask}
                states = model.transformer.decoder(torch.zeros_like(both), memory, **options).transpose(1, 2)
                results.append(model.class_embed(states))
        masked, unmasked = results
        assert_close(masked[:, :, :12], output.logits, rtol=0, atol=1e-5)
        assert_close(masked[:, :, 12:], replayed.group.logits, rtol=0, atol=1e-5)
        assert (unmasked[:, :, :12] - output.logits).abs().max() > 1e-2, "the mask must matter"
        assert (unmasked[:, :, 12:] - replayed.group.logits).abs().max() > 1e-2, "the mask must matter"


class TestAttached:
    """What a student with a teacher does."""

    @pytest.fixture
    def student(self) -> StandIn:
        student = stand_in(0)
        self.plain = copy.deepcopy(student)
        self.teacher = stand_in(1, queries=20, layers=4)
        self.handle = attach_teacher(student, self.teacher, reader=DetrReader)
        return student

    def test_outputs_are_the_students_and_one_entry_more(self, student: StandIn) -> None:
        images = batch()[0]
        expected, actual = self.plain(images), student(images)
        assert actual.keys() - expected.keys() == {KEY}
        assert_close({name: actual[name] for name in expected}, expected, rtol=0, atol=0)
        student_output, teacher_output = actual[KEY]
        assert student_output.logits.shape == (3, 4, 12, NUM_CLASSES)
        assert student_output.group.logits.shape == (3, 4, 20, NUM_CLASSES)
        assert teacher_output.logits.shape == (4, 4, 20, NUM_CLASSES)

    def test_evaluation_and_checkpoints_are_plain(self, student: StandIn) -> None:
        assert student.eval()(batch()[0]).keys() == self.plain(batch()[0]).keys()
        assert student.state_dict().keys() == self.plain.state_dict().keys()
        assert sum(1 for _ in student.parameters()) == sum(1 for _ in self.plain.parameters())
        student.train()
        assert not self.teacher.training

    def test_removing_the_handle_detaches_the_teacher(self, student: StandIn) -> None:
        self.handle.remove()
        assert KEY not in student(batch()[0])

    @pytest.mark.parametrize("reader", [Reader, DetrReader])
    def test_criterion_keeps_its_terms_and_adds_ours(self, reader: type[Reader]) -> None:
        student, plain = stand_in(0), stand_in(0)
        attach_teacher(student, stand_in(1, queries=20), reader=reader)
        criterion = DistillationCriterion(SetCriterion(layers=3), dkl.DETRDistillationLoss())
        images, targets = batch()
        losses, expected = criterion(student(images), targets), SetCriterion(layers=3)(plain(images), targets)
        assert_close({name: losses[name] for name in expected}, expected, rtol=0, atol=0)
        new = losses.keys() - expected.keys()
        assert new == set(criterion.distillation.names[: None if reader is DetrReader else 3])
        assert all(criterion.weight_dict[name] == 1 for name in new)
        assert SetCriterion(layers=3).weight_dict.items() <= criterion.weight_dict.items()

    def test_criterion_sees_the_outputs_that_it_knows(self, student: StandIn) -> None:
        seen = []

        class Criterion(SetCriterion):
            def forward(self, outputs: dict[str, Any], targets: Any) -> dict[str, Tensor]:
                seen.append(outputs.keys())
                return super().forward(outputs, targets)

        images, targets = batch()
        DistillationCriterion(Criterion(layers=3), dkl.DETRDistillationLoss())(student(images), targets)
        assert seen == [self.plain(images).keys()]

    def test_evaluation_has_the_terms_of_the_criterion_alone(self, student: StandIn) -> None:
        criterion = DistillationCriterion(SetCriterion(layers=3), dkl.DETRDistillationLoss()).eval()
        images, targets = batch()
        assert criterion(student.eval()(images), targets).keys() == SetCriterion(layers=3).weight_dict.keys()

    def test_targets_of_denoising_models_reach_the_student_alone(self) -> None:
        seen = []

        class Denoising(StandIn):
            def forward(self, samples: Tensor, targets: Any = None) -> dict[str, Any]:
                seen.append(targets)
                return {**super().forward(samples), "dn_meta": {"pad_size": 4}, "enc_outputs": {}}

        student, teacher = (Denoising(num_classes=NUM_CLASSES, num_queries=5) for _ in range(2))
        attach_teacher(student, teacher)
        outputs = student(*batch())
        assert [targets is None for targets in seen] == [False, True]
        assert outputs["dn_meta"] == {"pad_size": 4}
        assert outputs["enc_outputs"] == {}

    def test_wrong_uses(self, student: StandIn) -> None:
        with pytest.raises(ValueError, match=r"another model than the student.*deepcopy"):
            attach_teacher(student, student)
        criterion = DistillationCriterion(SetCriterion(layers=3), dkl.DETRDistillationLoss())
        images, targets = batch()
        with pytest.raises(ValueError, match=r"'distillation' in training: call attach_teacher"):
            criterion(self.plain(images), targets)
        wide = stand_in(2, channels=64)
        attach_teacher(self.plain, wide, reader=DetrReader)
        with pytest.raises(ValueError, match=r"must have 32 channels .*, got 64; .* leave QueryGroupTerm out"):
            self.plain(images)


def test_engine_trains_300_queries_under_900() -> None:
    """The engine knows nothing of the teacher; every term of it takes part, and they fall on a batch seen often."""
    student, teacher = stand_in(0, queries=300), stand_in(1, queries=900, layers=4)
    attach_teacher(student, teacher, reader=DetrReader)
    criterion = DistillationCriterion(SetCriterion(layers=3), dkl.DETRDistillationLoss())
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    images, targets = batch()
    history = train_one_epoch(student, criterion, [(images[:1], targets[:1])] * 6, optimizer)
    assert set(criterion.distillation.names) <= history[0].keys()
    first, last = (sum(term for name, term in step.items() if "kd" in name) for step in (history[0], history[-1]))
    assert last < 0.8 * first


def test_projections_of_another_width_are_learned() -> None:
    student, teacher = stand_in(0), stand_in(1, channels=64)
    attach_teacher(student, teacher, reader=DetrReader, query_group=False)
    distillation = dkl.DETRDistillationLoss([dkl.FeatureTerm(32, 64)])
    before = copy.deepcopy(distillation.state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    learn_projections(optimizer, distillation)
    train_one_epoch(student, DistillationCriterion(SetCriterion(layers=3), distillation), [batch()], optimizer)
    assert before
    assert all((tensor != before[name]).any() for name, tensor in distillation.state_dict().items())


def step_of_gradient_descent(images: Tensor, targets: list[dict[str, Tensor]], rank: int | None) -> dict[str, Tensor]:
    """How one step at learning rate 1 moves every weight; with a rank, in that process of several."""
    student, teacher = stand_in(0), stand_in(1, queries=20, channels=64)
    torch.manual_seed(2)
    distillation = dkl.DETRDistillationLoss([dkl.FeatureTerm(32, 64)])
    attach_teacher(student, teacher, reader=DetrReader, query_group=False)
    criterion = DistillationCriterion(SetCriterion(layers=3), distillation)
    learned = {**dict(student.named_parameters()), **dict(distillation.named_parameters())}
    before = {name: parameter.detach().clone() for name, parameter in learned.items()}
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    learn_projections(optimizer, distillation)
    model = student if rank is None else DistributedDataParallel(student)
    train_one_epoch(model, criterion, [(images, targets)], optimizer, max_norm=float("inf"))
    return {name: before[name] - parameter.detach() for name, parameter in learned.items()}


def replica(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    images, targets = batch(UNEVEN)
    half = slice(0, 1) if rank == 0 else slice(1, 2)
    torch.save(step_of_gradient_descent(images[half], targets[half], rank), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    images, targets = batch(UNEVEN)
    assert len(targets[0]["labels"]) != len(targets[1]["labels"])
    joined = step_of_gradient_descent(images[:2], targets[:2], None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(replica, args=(port, tmp_path), nprocs=2)
    for rank in range(2):
        step = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, expected in joined.items():
            assert_close(step[name], expected, rtol=0, atol=1e-5 + 1e-5 * expected.abs().max().item())
