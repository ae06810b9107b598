"""Names of images, which find their files: none leads out of the folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from torch import Tensor

__all__: list[str] = []

ImageId = int | str | np.integer[Any] | Tensor
# Of 255 bytes that file systems grant a name, some are for its ending and for the temporary name.
_LONGEST = 200


def image_names(image_ids: Iterable[ImageId]) -> list[str]:
    """The names of images, each a path within the folder."""
    return [image_name(image_id) for image_id in image_ids]


def plain_id(image_id: Any) -> int | str:
    """A string as it is; a whole number as one, if it comes in a tensor or an array, too."""
    if isinstance(image_id, Tensor | np.ndarray) and image_id.shape in ((), (1,)):
        image_id = image_id.item()
    if isinstance(image_id, int | np.integer) and not isinstance(image_id, bool):
        return int(image_id)
    if not isinstance(image_id, str):
        msg = f"`image_ids` must be numbers or strings, got {image_id!r} of type {type(image_id).__name__}"
        raise TypeError(msg)
    return str(image_id)


def image_name(image_id: ImageId) -> str:
    """The name of an image; raise for one that is no number and no path within the folder."""
    name = str(plain_id(image_id))
    parts = PurePosixPath(name).parts
    if "/".join(parts) != name or not parts or ".." in parts or "\\" in name or PureWindowsPath(name).anchor:
        msg = f"`image_ids` must be numbers or paths within the folder, without '..', got {image_id!r}"
        raise ValueError(msg)
    if "\0" in name or any(_length(part) > _LONGEST for part in parts):
        msg = f"`image_ids` must be names that a file may have, of at most {_LONGEST} bytes, got {image_id!r}"
        raise ValueError(msg)
    return name


def validate_different(names: list[str]) -> None:
    """Raise if an image comes twice: the one would replace the other."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        msg = f"`image_ids` must be different, for each names a file, got {twice} more than once"
        raise ValueError(msg)


def _length(part: str) -> int:
    """Bytes of a name; too many where it cannot be written."""
    try:
        return len(part.encode())
    except UnicodeEncodeError:
        return _LONGEST + 1
