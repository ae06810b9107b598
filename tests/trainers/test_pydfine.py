"""pydfine, with its own Trainer: an N of two maps under an S of three, many sizes of images, an average of weights."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("dfine", reason="`make trainers` installs pydfine")

from dfine.backends.native import DFINE
from dfine.config import DFINEConfig
from dfine.train import Trainer
from torch.testing import assert_close

from detr_kd_losses.taps import Tap
from trainers.pydfine import distil

from support.real_trainers import check_reading, check_traces, images, targets


def configuration(size: str) -> DFINEConfig:
    return DFINEConfig.preset(
        size, backbone_pretrained=False, num_classes=5, num_queries=30, num_top_queries=30, imgsz=128, warmup_iters=2
    )


def build(size: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return DFINE.from_config(configuration(size))


def batches() -> list:
    return [(images(size, seed=size), targets(5, seed=size)) for size in (128, 160, 192)]


def test_reading() -> None:
    student, teacher = build("n"), build("n", seed=1)
    truth = targets(5)
    check_reading(student, teacher, lambda model: model(images()), lambda model: model(images(192), truth), 3, 30)
    with torch.no_grad(), Tap(teacher.eval()) as tap:
        teacher(images(160))  # other than the 128 x 128 to which evaluation is fixed
    distributions = tap.output().distributions
    assert distributions.logits.shape == (3, 2, 30, 4 * 33)
    edges = distributions.logits.unflatten(-1, (4, 33)).softmax(-1) @ distributions.bins / distributions.scale
    size = torch.cat([distributions.references[..., 2:]] * 2, -1)
    width = (edges * size)[..., [0, 2]].sum(-1) + size[..., 0]
    assert_close(width, tap.output().boxes[..., 2], rtol=0, atol=1e-5)


def test_steps() -> None:
    student, teacher = build("n"), build("s", seed=1)
    trainer = Trainer(student, configuration("n"), device=torch.device("cpu"), use_ema=True, visualize=False)
    trainer = distil(trainer, teacher, levels=([0, 1], [1, 2]))
    before = [parameter.detach().clone() for parameter in trainer.criterion.distillation.parameters()]
    assert trainer.criterion.check(lambda model: model(images()), targets(5))
    trainer.fit(batches(), epochs=1)
    assert trainer.criterion.counted.startswith("the engine sums all")
    assert any((a != b).any() for a, b in zip(before, trainer.criterion.distillation.parameters(), strict=True))
    saved = torch.load(trainer.output_dir / "last.pth", weights_only=False)
    assert saved["model"].keys() == build("n").state_dict().keys()
    check_traces(student, build("n"), teacher)
    assert trainer.ema.module.eval()(images())["pred_logits"].isfinite().all()
