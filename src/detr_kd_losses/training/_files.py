"""One file for each image: written whole or not at all, and read with errors that say which image and what to do."""

from __future__ import annotations

import pickle
import uuid
from pathlib import Path
from typing import Any

import torch

from detr_kd_losses.training._contents import FIELDS

__all__: list[str] = []

FORMAT = 1
_UNREADABLE = (RuntimeError, ValueError, KeyError, EOFError, OSError, pickle.UnpicklingError)


def write(path: Path, content: dict[str, Any]) -> None:
    """Put `content` into the file, which a job that is killed meanwhile leaves as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        torch.save({"format": FORMAT, **content}, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: Path, image_id: int | str) -> dict[str, Any]:
    """What :func:`write` has put into the file of an image."""
    again = "save them again with save_predictions"
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        msg = (
            f"the predictions for image {image_id!r} cannot be read: {path} is damaged or cut short; {again} ({reason})"
        )
        raise ValueError(msg) from error
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        said = "no format" if version is None else f"format {version!r}"
        msg = f"the predictions for image {image_id!r} in {path} must have format {FORMAT}, got {said}: {again}"
        raise ValueError(msg)
    missing = [field for field in FIELDS if field not in content]
    if missing:
        msg = f"the predictions for image {image_id!r} in {path} lack {missing}: {again}"
        raise ValueError(msg)
    return {field: content[field] for field in FIELDS}
