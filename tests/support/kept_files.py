"""Files that one set of versions writes and another one reads: `python tests/support/kept_files.py FOLDER`.

Reads whatever earlier calls have left in the folder, and leaves its own there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import detr_kd_losses as dkl

IMAGES = ["a", "b"]


def said_by_a_teacher() -> dkl.DetectorOutput:
    """The same numbers in each version: none of them is drawn."""
    count = iter(range(1, 9))

    def numbers(*shape: int) -> torch.Tensor:
        size = torch.Size(shape).numel()
        return (torch.arange(size).reshape(shape) + next(count)).remainder(97) / 128

    features = [numbers(2, 8, 4, 4), numbers(2, 8, 2, 2)]
    return dkl.DetectorOutput(numbers(2, 2, 6, 3), numbers(2, 2, 6, 4), numbers(2, 2, 6, 8), features)


def criterion() -> dkl.DETRDistillationLoss:
    return dkl.DETRDistillationLoss([dkl.LogitsTerm(), dkl.FeatureTerm([8, 8], [16, 16])])


def main(folder: Path) -> None:
    output, earlier = said_by_a_teacher(), sorted(folder.glob("*"))
    for kept in earlier:
        for form in ("pt", "safetensors"):
            read = dkl.OfflineTeacher(kept / form, features=True)(IMAGES)
            for one, other in zip((*read[:3], *read.features), (*output[:3], *output.features), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)
        criterion().load_state_dict(torch.load(kept / "criterion.pt", weights_only=True))
    own = folder / f"torch-{torch.__version__}"
    dkl.save_predictions(own / "pt", IMAGES, output, features=True)
    with dkl.PredictionWriter(own / "safetensors", features=True) as writer:
        writer.add(IMAGES, output)
    torch.save(criterion().state_dict(), own / "criterion.pt")
    print(f"wrote {own.name}, read {', '.join(kept.name for kept in earlier) or 'nothing'}")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
