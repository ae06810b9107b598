"""Saves what a teacher says: one file for each image, or fewer files of many images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from detr_kd_losses._validation import validate_count
from detr_kd_losses.heads import Activation
from detr_kd_losses.outputs import DetectorOutput
from detr_kd_losses.training import _files, _shards
from detr_kd_losses.training._contents import Kept, views_of
from detr_kd_losses.training._image_ids import ImageId, image_names, validate_different
from detr_kd_losses.training.geometry import Geometry

__all__ = ["PredictionWriter", "save_predictions"]


def save_predictions(
    folder: str | Path,
    image_ids: Sequence[ImageId] | Tensor,
    output: DetectorOutput,
    *,
    geometries: Sequence[Geometry] | None = None,
    features: bool = False,
    dtype: torch.dtype | None = None,
    activation: Activation | None = None,
    layers: Sequence[int] | None = None,
    topk: int | None = None,
    queries: bool = True,
) -> list[Path]:
    """Save what a teacher says about a batch, one file for each image.

    300 queries of 6 layers with their outputs take 1.2 MB an image in half precision, 147 GB for COCO; the last layer
    without the outputs 0.05 MB and 6.4 GB. :class:`PredictionWriter` makes fewer and larger files.

    Args:
        folder: Made if it is missing.
        image_ids: B names or numbers that find the images again; tensors of one number, too. A name may be a path
            within the folder, and none leads out of it.
        output: The teacher's outputs: logits, boxes, and perhaps queries and features; no file has its other fields.
        geometries: B views of the images in which the teacher has seen them. None: whole and unpadded.
        features: Whether to save features, which need far more space and serve only images that are not augmented.
        dtype: Dtype of logits, queries and features in the files, such as `torch.float16`. None: as they are. Boxes
            keep theirs. A number beyond the range of `dtype` becomes its last one.
        activation: Head of the teacher, which the files then say to whoever loads them. None: they do not say it.
        layers: Which decoder layers to save, such as ``[-1]``, the last. None: all.
        topk: Save so many queries of each image, those with the highest class score in the last layer, the surest
            first; needs `activation`. None: all.
        queries: Whether to save the decoder's outputs, which the feature loss and the query group need.

    Returns:
        The files, in the order of `image_ids`.

    Raises:
        ValueError: If the numbers of images differ, an image comes twice or would leave the folder, features are asked
            for and not there, `output` has a field that is not saved, or an option does not fit.
        TypeError: If `output` is no :class:`DetectorOutput`, an id no number or name, or `dtype` is not floating.

    Examples:
        >>> import tempfile
        >>> output = DetectorOutput(torch.randn(6, 2, 300, 80), torch.rand(6, 2, 300, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print([path.name for path in save_predictions(folder, [139, 285], output)])
        ['139.pt', '285.pt']
    """
    kept = Kept(features, dtype, activation, layers, topk, queries)
    names = image_names(image_ids)
    views = views_of(geometries, names, output)
    validate_different(names)
    contents = kept.contents(output, views)
    paths = [Path(folder) / f"{name}.pt" for name in names]
    for path, content in zip(paths, contents, strict=True):
        _files.write(path, content)
    return paths


class PredictionWriter:
    """Saves what a teacher says about a data set, many images to a file (extra ``offline``: safetensors).

    Files are written whole under a temporary name, then renamed, and never changed; a job that is killed loses the
    images since the last one, and its file is not there. Several processes may write to a folder. Of an image that is
    saved again, the newer predictions count.

    Args:
        folder: Made if it is missing.
        images_per_file: Images of a file. They are in memory until it is written.
        features: As in :func:`save_predictions`, like the other options.
        dtype: Dtype of logits, queries and features in the files.
        activation: Head of the teacher.
        layers: Which decoder layers to save. None: all.
        topk: How many queries of each image to save. None: all.
        queries: Whether to save the decoder's outputs.

    Raises:
        ModuleNotFoundError: If safetensors is not installed.

    Examples:
        >>> import tempfile
        >>> from detr_kd_losses import OfflineTeacher
        >>> output = DetectorOutput(torch.randn(6, 2, 300, 80), torch.rand(6, 2, 300, 4))
        >>> folder = tempfile.TemporaryDirectory()
        >>> with PredictionWriter(folder.name, layers=[-1], topk=100, activation="sigmoid") as writer:
        ...     for image_ids in [[139, 285], [632, 724]]:
        ...         writer.add(image_ids, output)
        >>> len(writer.files), OfflineTeacher(folder.name)([724, 139]).logits.shape
        (1, torch.Size([1, 2, 100, 80]))
        >>> folder.cleanup()
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        images_per_file: int = 256,
        features: bool = False,
        dtype: torch.dtype | None = None,
        activation: Activation | None = None,
        layers: Sequence[int] | None = None,
        topk: int | None = None,
        queries: bool = True,
    ) -> None:
        validate_count("images_per_file", images_per_file)
        _shards.safetensors()
        self.folder, self.images_per_file, self.files = Path(folder), int(images_per_file), list[Path]()
        self._kept = Kept(features, dtype, activation, layers, topk, queries)
        self._waiting: dict[str, dict[str, Any]] = {}
        self._written: set[str] = set()

    def add(
        self,
        image_ids: Sequence[ImageId] | Tensor,
        output: DetectorOutput,
        *,
        geometries: Sequence[Geometry] | None = None,
    ) -> None:
        """Take what the teacher says about a batch, and write the files that are full.

        Args:
            image_ids: B names or numbers that find the images again.
            output: The teacher's outputs.
            geometries: B views of the images in which the teacher has seen them. None: whole and unpadded.

        Raises:
            ValueError: As in :func:`save_predictions`; and if an image comes twice.
            TypeError: As in :func:`save_predictions`.
        """
        names = image_names(image_ids)
        views = views_of(geometries, names, output)
        validate_different([*names, *(name for name in names if name in self._written or name in self._waiting)])
        self._waiting.update(zip(names, self._kept.contents(output, views), strict=True))
        while len(self._waiting) >= self.images_per_file:
            self._write(self.images_per_file)

    def close(self) -> None:
        """Write what has been added since the last file."""
        if self._waiting:
            self._write(len(self._waiting))

    def __enter__(self) -> PredictionWriter:
        """Go on until the block ends, then :meth:`close`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write what has been added, also where the block was left by an error: it is whole."""
        self.close()

    def _write(self, number: int) -> None:
        names = list(self._waiting)[:number]
        self.files.append(_shards.write(self.folder, names, [self._waiting[name] for name in names]))
        for name in names:
            del self._waiting[name]
        self._written.update(names)
