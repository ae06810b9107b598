"""Files of many images, in the format of safetensors: any image is read without the others.

A file is written whole under a temporary name, then renamed, and never changed. Its header says which images it has, so
that there is no index beside it that could be lost or be of another state: a reader reads the headers.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

__all__: list[str] = []

FORMAT = 1
_PATTERN = "predictions-*.safetensors"
_KEY = "detr_kd_losses"
_TENSORS = ("logits", "boxes", "queries")
_LEVELS = ("features", "padding_mask")
# Files that a process keeps open: each costs a mapping and its header.
_MOST_OPEN = 64


def write(folder: Path, names: Sequence[str], contents: Sequence[dict[str, Any]]) -> Path:
    """Put the contents of images into a new file, which sorts behind older ones."""
    tensors = {}
    for index, content in enumerate(contents):
        for field in _TENSORS:
            if content[field] is not None:
                tensors[f"{index}.{field}"] = content[field]
        for field in _LEVELS:
            for level, tensor in enumerate(content[field] or []):
                tensors[f"{index}.{field}.{level}"] = tensor
    own = [
        [name, list(content["geometry"]), content["activation"], content["queries"] is not None]
        + [len(content[field] or []) for field in _LEVELS]
        for name, content in zip(names, contents, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"predictions-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.safetensors"
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        said = json.dumps({"format": FORMAT, "images": own})
        safetensors().torch.save_file(tensors, unfinished, metadata={_KEY: said})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


class Shards:
    """Finds and reads the images of all such files of a folder. It may be pickled and forked; there is no lock."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: set[str] = set()
        self._index: dict[str, tuple[str, int, list[Any]]] = {}
        self._damaged: dict[Path, str] = {}
        self._open: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open files, which are a process's own."""
        return {**self.__dict__, "_open": {}}

    def find(self, name: str, image_id: int | str) -> tuple[Path, dict[str, Any]] | None:
        """The file and the content of an image; None if no file has it."""
        if name not in self._index:
            self._look_for_files()
        if name in self._index:
            file, position, said = self._index[name]
            return self._folder / file, self._content(file, position, said, image_id)
        for path, reason in self._damaged.items():
            raise ValueError(_unreadable(path, image_id, reason))
        return None

    def _look_for_files(self) -> None:
        """Read the headers of the files that are new; of an image in several, the newest counts."""
        self._damaged = {}
        for path in sorted(self._folder.glob(_PATTERN)):
            if path.name not in self._read:
                try:
                    said = json.loads((self._opened(path.name).metadata() or {})[_KEY])
                    if said["format"] != FORMAT:
                        self._damaged[path] = f"its format must be {FORMAT}, got {said['format']}"
                        continue
                    entries = {image[0]: (path.name, at, image[1:]) for at, image in enumerate(said["images"])}
                except (safetensors().SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                    self._damaged[path] = _reason(error)
                    continue
                self._index.update(entries)
                self._read.add(path.name)

    def _content(self, file: str, position: int, said: list[Any], image_id: int | str) -> dict[str, Any]:
        """What :func:`write` was given for an image."""
        geometry, activation, has_queries, *levels = said
        content: dict[str, Any] = {"geometry": tuple(geometry), "activation": activation}
        try:
            opened = self._opened(file)
            for field in _TENSORS:
                is_there = field != "queries" or has_queries
                content[field] = opened.get_tensor(f"{position}.{field}") if is_there else None
            for field, number in zip(_LEVELS, levels, strict=True):
                every = [opened.get_tensor(f"{position}.{field}.{level}") for level in range(number)]
                content[field] = every or None
        except (safetensors().SafetensorError, OSError) as error:
            raise ValueError(_unreadable(self._folder / file, image_id, _reason(error))) from error
        return content

    def _opened(self, file: str) -> Any:
        opened = self._open.get(file)
        if opened is None:
            if len(self._open) >= _MOST_OPEN:
                self._open.clear()
            opened = self._open[file] = safetensors().safe_open(self._folder / file, framework="pt")
        return opened


def safetensors() -> ModuleType:
    """The package safetensors, which is an extra."""
    try:
        import safetensors.torch  # noqa: PLC0415
    except ModuleNotFoundError as error:
        msg = "files of many images need safetensors: pip install 'detr-kd-losses[offline]'"
        raise ModuleNotFoundError(msg, name="safetensors") from error
    return safetensors


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _unreadable(path: Path, image_id: int | str, reason: str) -> str:
    return (
        f"the predictions for image {image_id!r} cannot be read: {path} is damaged or cut short; delete it, and save "
        f"its images again with PredictionWriter ({reason})"
    )
