"""A teacher on disk: bytes of an image, and images a second that are written and read.

    python examples/benchmarks/offline.py           # about a minute on a CPU

Generated predictions of COCO's shape (80 classes, 300 queries of 256 channels in 6 layers, half precision), in three
settings, each as a file for each image and as files of 256 images. They are read in random order in batches of 16, in
one process and by the workers of a data loader, and lie in the cache of the operating system, so that the numbers say
what the library costs, not the disk. Writes results/offline--cpu.json.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import save
from torch.utils.data import DataLoader

import detr_kd_losses as dkl

LAYERS, QUERIES, CHANNELS, CLASSES, BATCH = 6, 300, 256, 80, 16
COCO_IMAGES = 118_287
WORKERS = 2
SECONDS = 3.0

SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "everything": (256, {}),
    "last layer, without queries": (1024, {"layers": [-1], "queries": False}),
    "last layer, without queries, best 100": (1024, {"layers": [-1], "queries": False, "topk": 100}),
}


def predictions(seed: int) -> dkl.DetectorOutput:
    """What a teacher might say about a batch."""
    generator = torch.Generator().manual_seed(seed)
    shape = LAYERS, BATCH, QUERIES
    logits = torch.randn(*shape, CLASSES, generator=generator) - 4
    boxes = 0.25 + 0.5 * torch.rand(*shape, 4, generator=generator)
    return dkl.DetectorOutput(logits, boxes, queries=torch.randn(*shape, CHANNELS, generator=generator))


def write(folder: Path, images: int, *, singly: bool, **options: Any) -> float:
    """Save so many images; return how many a second."""
    said = [predictions(seed) for seed in range(4)]
    options = {"dtype": torch.float16, "activation": "sigmoid", **options}
    start = time.perf_counter()
    writer = None if singly else dkl.PredictionWriter(folder, **options)
    for batch in range(images // BATCH):
        names = range(BATCH * batch, BATCH * (batch + 1))
        if writer is None:
            dkl.save_predictions(folder, names, said[batch % 4], **options)
        else:
            writer.add(names, said[batch % 4])
    if writer is not None:
        writer.close()
    return images / (time.perf_counter() - start)


def read(folder: Path, images: int, workers: int) -> float:
    """Read batches in random order for some seconds; return how many images a second, without the start."""
    teacher = dkl.OfflineTeacher(folder)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0)).tolist()
    many = order * (1 + 100_000 // images)
    loader = iter(DataLoader(many, batch_size=BATCH, collate_fn=teacher, num_workers=workers))
    for _ in range(max(4 * workers, images // BATCH // 2)):
        next(loader)
    read_images, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        read_images += next(loader).logits.shape[1]
    return read_images / (time.perf_counter() - start)


def main() -> None:
    """Measure all settings, print a table, save the numbers."""
    torch.set_num_threads(1)
    results = {}
    print(f"| setting | files | KB an image | GB for COCO | written / s | read / s | read / s, {WORKERS} workers |")
    print("|---|---|---|---|---|---|---|")
    for setting, (images, options) in SETTINGS.items():
        for files, singly in (("one an image", True), ("of 256 images", False)):
            with tempfile.TemporaryDirectory() as root:
                folder = Path(root)
                written = write(folder, images, singly=singly, **options)
                size = sum(path.stat().st_size for path in folder.iterdir()) / images
                alone, together = (read(folder, images, workers) for workers in (0, WORKERS))
            row = [
                f"{size / 1e3:.1f}",
                f"{size * COCO_IMAGES / 1e9:.1f}",
                *(f"{x:.0f}" for x in (written, alone, together)),
            ]
            print(f"| {setting} | {files} | {' | '.join(row)} |", flush=True)
            results[f"{setting}, files {files}"] = {
                "bytes_per_image": size,
                "written_per_second": written,
                "read_per_second": alone,
                f"read_per_second_by_{WORKERS}_workers": together,
            }
    print(save("offline", {"settings": results}))


if __name__ == "__main__":
    main()
