"""What each term alone takes of a step, forward and backward, on one core.

    python examples/benchmarks/term_costs.py           # a minute on a CPU; with the extra `testing`

The step is that of criterion.py: two images of 800 x 1333, 6 layers, 300 queries on both sides, 80 classes, four levels
of 256 channels; beside it box distributions of 33 bins and masks of 50 x 84 cells. Processor time, in turns. Each row
has the matching that its term needs. Writes results/term_costs--cpu.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from measure import save

import detr_kd_losses as dkl
from criterion import DEFAULT, make_step
from detr_kd_losses.testing.steps import CriterionInputs

BINS, MASK_SIZE, THIRD, REPEATS = 33, (50, 84), 1 / 3, 7
TERMS: dict[str, Callable[[], dkl.Term]] = {
    "LogitsTerm": dkl.LogitsTerm,
    "LogitsTerm, joint": lambda: dkl.LogitsTerm(matching="joint"),
    "LogitsTerm, targets": lambda: dkl.LogitsTerm(matching="targets"),
    "LogitsTerm, confidence": lambda: dkl.LogitsTerm(weighting="confidence"),
    "FeatureTerm": dkl.FeatureTerm,
    **{
        f"PlainFeatureTerm, {distance}": lambda distance=distance: dkl.PlainFeatureTerm(distance=distance)
        for distance in ("mse", "cosine", "pearson", "channel")
    },
    "QueryGroupTerm": dkl.QueryGroupTerm,
    "SharedQueryTerm": dkl.SharedQueryTerm,
    "BoxDistributionTerm": dkl.BoxDistributionTerm,
    "MaskTerm": dkl.MaskTerm,
}


def with_distributions_and_masks(step: CriterionInputs) -> CriterionInputs:
    """The step with what heads of D-FINE's kind and of segmentation say, too."""

    def more(output: dkl.DetectorOutput, *, learns: bool) -> dkl.DetectorOutput:
        queries = output.logits.shape[:3]
        logits = torch.randn(*queries, 4 * BINS, requires_grad=learns)
        edges = dkl.BoxDistributions(logits, output.boxes.detach(), torch.linspace(-4, 4, BINS), 4.0)
        return output._replace(distributions=edges, masks=torch.randn(*queries, *MASK_SIZE, requires_grad=learns))

    return step._replace(student=more(step.student, learns=True), teacher=more(step.teacher, learns=False))


def milliseconds(step: CriterionInputs) -> dict[str, float]:
    """Median processor time of each term."""
    criteria = {name: dkl.DETRDistillationLoss([term()]) for name, term in TERMS.items()}
    times: dict[str, list[float]] = {name: [] for name in criteria}
    for _ in range(REPEATS + 1):
        for name, criterion in criteria.items():
            start = time.process_time()
            sum(criterion(*step).values()).backward()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = milliseconds(with_distributions_and_masks(make_step(DEFAULT)))
    for name, time_of_term in results.items():
        print(f"{name:28}{time_of_term:8.0f} ms")
    print(save("term_costs", {"milliseconds": results}))


if __name__ == "__main__":
    main()
