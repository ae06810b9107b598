"""Steps of the criterion at the sizes of its tests, what it makes of them, and a map over their tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import detr_kd_losses as dkl
from detr_kd_losses.testing import steps, strategies

C, D, B = 5, 8, 2
LEVELS = ((6, 8), (3, 4))


def make_output(seed, layers, queries, *, channels=C, **options):
    """A detector's outputs with two levels of features without padding, from `channels` of logits."""
    height, width = LEVELS[0]
    return steps.make_output(
        stages=layers,
        images=B,
        queries=queries,
        classes=channels,
        channels=D,
        height=height,
        width=width,
        levels=len(LEVELS),
        padded=False,
        seed=seed,
        **options,
    )


def make_targets(counts=(3, 1), padded=4):
    """So many targets of each image, of so many with padding."""
    truth = strategies.make_targets(images=len(counts), targets=padded, classes=C, seed=99)
    mask = torch.arange(padded) < torch.tensor(counts).unsqueeze(-1)
    return truth._replace(boxes=truth.boxes.float(), mask=mask)


def leaves(output):
    """The tensors of a student that a criterion may give a gradient."""
    tensors = tree_leaves(output._replace(queries=None, padding_mask=None))
    return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.requires_grad]


def over_tensors(function, value: Any) -> Any:
    """The outputs or targets with `function` of each tensor in its place."""
    return tree_map_only(torch.Tensor, function, value)


def floating(function):
    return lambda tensor: function(tensor) if tensor.is_floating_point() else tensor


def make_criterion(preset="paper", **options):
    """A preset with other options, each set wherever it is one."""
    criterion = dkl.DETRDistillationLoss(preset)
    for name, value in options.items():
        owners = [module for module in criterion.modules() if name in getattr(module, "rules", ())]
        assert owners, f"no option {name!r}"
        for owner in owners:
            setattr(owner, name, value)
    return criterion


def loss_and_gradients(student, teacher, targets, preset="official", **options):
    """All terms of the criterion, and the gradient of each of the student's tensors."""
    criterion = make_criterion(preset, **options)
    leaves = over_tensors(floating(lambda tensor: tensor.detach().clone().requires_grad_()), student)
    losses = criterion(leaves, teacher, targets)
    sum(losses.values()).backward()
    assert set(losses) == set(criterion.names), "every term applies"
    tensors = {f"group_{name}": tensor for name, tensor in leaves.group._asdict().items()}
    tensors |= {name: getattr(leaves, name) for name in ("logits", "boxes", "features")}
    reached = {"logits": ("logits", "boxes"), "feature": ("features",), "query_group": ("group_logits", "group_boxes")}
    tensors = {name: tensors[name] for term in criterion.terms for name in reached[term]}
    grads = {name: tensor.grad for name, tensor in tensors.items()}
    return {name: loss.detach() for name, loss in losses.items()}, grads
