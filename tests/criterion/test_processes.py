"""Modules that are copied, saved and exported; other processes and threads; a long run."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import detr_kd_losses as dkl
import soak
from detr_kd_losses.testing.steps import make_step

from support.registry import TRIALS
from support.steps import loss_and_gradients, over_tensors

MODULES = {
    **{name: loss.module(**trial.options) for name, (loss, trial) in TRIALS.items() if loss.module},
    "features, projected": dkl.TargetAwareFeatureLoss(3, 4),
    "criterion, projected": dkl.DETRDistillationLoss([dkl.LogitsTerm(), dkl.FeatureTerm([3], [4])]),
}


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_modules_copy_and_pickle(duplicate, module):
    other = duplicate(module)
    assert repr(other) == repr(module)
    assert_close(other.state_dict(), module.state_dict())


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_state_dict_round_trip(module, tmp_path):
    torch.save(module.state_dict(), tmp_path / "loss.pt")
    other = copy.deepcopy(module)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    assert_close(other.state_dict(), module.state_dict())
    # Options are no state: checkpoints do not depend on them.
    assert len(module.state_dict()) == len(list(module.parameters()))


class LossPart(nn.Module):
    """The part that a compiler may have: losses under given assignments."""

    def forward(self, student_logits, student_boxes, teacher_logits, teacher_boxes, assignment, features, teacher):
        terms = dkl.hungarian_distillation_loss(
            student_logits, student_boxes, teacher_logits, teacher_boxes, assignment
        )
        quality = teacher_logits.sigmoid().amax(-1)
        return sum(terms.values()) + dkl.target_aware_feature_loss(features, *teacher, quality)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated:DeprecationWarning")  # PyTorch 2.6's own
def test_export():
    student, teacher, _ = make_step()
    predictions = (student.logits, student.boxes, teacher.logits, teacher.boxes)
    assignment = dkl.match_teacher(*predictions)
    arguments = (*predictions, assignment, student.features, (teacher.features, teacher.queries))
    program = torch.export.export(LossPart(), arguments)
    assert_close(program.module()(*arguments), LossPart()(*arguments))


def in_a_worker(batch):
    """What a worker of a data loader or a replica may do: match and distil."""
    torch.set_num_threads(1)
    return [float(loss) for loss in dkl.DETRDistillationLoss()(*batch).values()]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(method):
    batch = make_step()
    expected = in_a_worker(batch)  # the parent has used the library before
    plain = [over_tensors(torch.Tensor.tolist, part) for part in batch]
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(worker_entry, (plain,)) == pytest.approx(expected, rel=1e-5)


def worker_entry(plain):
    """Rebuild the batch: tensors travel as numbers, so that no memory is shared."""

    def rebuilt(record):
        fields = (rebuilt(value) if isinstance(value, tuple) else value for value in record)
        return type(record)(*(torch.tensor(value) if isinstance(value, list) else value for value in fields))

    return in_a_worker(rebuilt(record) for record in plain)


def test_threads():
    batches = [make_step(images=images) for images in (1, 2, 3, 4)] * 4
    expected = [loss_and_gradients(*batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda batch: loss_and_gradients(*batch), batches))
    assert_close(actual, expected)


def test_soak():
    report = soak.soak(200)
    assert report.shapes == 200
    assert report.not_finite == 0
    assert report.warnings == 0
    assert report.tensor_growth <= 0  # fewer: of an earlier test
