"""Time to solve the assignment problems of a training step: this package against its rivals.

    python examples/benchmarks/assignment.py           # about two minutes on a CPU

Every solver's assignments are checked against SciPy's float64 optimum first; that first call is reported apart, since
it may compile. Then all are timed in turns. With a GPU the costs lie there: host solvers are timed from costs on the
host, and from costs on the GPU, copy and way back included. Writes results/assignment--<device>.json.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from kd_costs import detection_problems, distillation_problems, uniform_problems
from measure import save, side_by_side, synchronize
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import detr_kd_losses as dkl
from detr_kd_losses.assignment import BACKENDS
from detr_kd_losses.assignment._triton import TritonBackend

# Of the range of a problem's costs, per pair: what rounding them to 26 bits may cost.
TOLERANCE = 2.0**-26


@dataclass(frozen=True)
class Case:
    """A batch of problems: P matrices of N x T, with random numbers of valid columns if ragged."""

    name: str
    make: Callable[..., Tensor]
    problems: int
    rows: int
    columns: int
    ragged: bool = False
    needs_gpu: bool = False


CASES = (
    Case("KD, 300 x 300", distillation_problems, 96, 300, 300),
    Case("KD, 300 x 900", distillation_problems, 96, 300, 900),
    Case("KD, 900 x 900, 8 problems", distillation_problems, 8, 900, 900),
    Case("KD, 900 x 900", distillation_problems, 96, 900, 900, needs_gpu=True),
    Case("GT, 300 x (0..100)", detection_problems, 96, 300, 100, ragged=True),
    Case("GT, 300 x 20", detection_problems, 96, 300, 20),
    Case("uniform, 300 x 300", uniform_problems, 96, 300, 300),
)

Solver = Callable[[Tensor, "Tensor | None"], Tensor]


def scipy_one(cost: np.ndarray, mask: np.ndarray | None, out: np.ndarray) -> None:
    """Solve one problem whose valid columns come first."""
    rows, columns = linear_sum_assignment(cost if mask is None else cost[:, : mask.sum()])
    out[rows] = columns


def scipy_loop(cost: Tensor, mask: Tensor | None, mapped: Callable[..., object] = map) -> Tensor:
    out = np.full(cost.shape[:2], -1)
    masks = [None] * len(cost) if mask is None else mask.numpy()
    list(mapped(scipy_one, cost.numpy(), masks, out))
    return torch.from_numpy(out)


def scipy_threads(cost: Tensor, mask: Tensor | None) -> Tensor:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return scipy_loop(cost, mask, pool.map)


def lapjvr_batch(cost: Tensor, mask: Tensor | None) -> Tensor:  # noqa: ARG001
    import lap  # noqa: PLC0415

    out = np.full(cost.shape[:2], -1)
    all_rows, all_columns = lap.lapjvr_batch(cost.numpy(), extend_cost=True, return_cost=False)
    for one, rows, columns in zip(out, all_rows, all_columns, strict=True):
        one[rows] = columns
    return torch.from_numpy(out)


def torch_linear_assignment(cost: Tensor, mask: Tensor | None) -> Tensor:  # noqa: ARG001
    from torch_linear_assignment import batch_linear_assignment  # noqa: PLC0415

    return batch_linear_assignment(cost)


def package(backend: str) -> Solver:
    return lambda cost, mask: dkl.linear_sum_assignment(cost, column_mask=mask, backend=backend)


def host_solvers(case: Case) -> dict[str, Solver]:
    solvers = {"SciPy loop": scipy_loop, "SciPy threads": scipy_threads}
    if find_spec("lap") and not case.ragged:
        solvers["lapx.lapjvr_batch"] = lapjvr_batch
    cost = torch.empty(1, case.rows, case.columns)
    names = [name for name, backend in BACKENDS.items() if not backend.unsupported_reasons(cost)]
    return {**solvers, **{f"package, {name}": package(name) for name in names}}


def gpu_solvers(case: Case) -> dict[str, Solver]:
    solvers: dict[str, Solver] = {"package, triton": lambda cost, mask: TritonBackend().solve(cost, None, mask)}
    if find_spec("torch_linear_assignment") and not case.ragged:
        solvers["torch-linear-assignment"] = torch_linear_assignment
    return solvers


def with_copies(solver: Solver) -> Solver:
    """A host solver for costs on the GPU."""
    return lambda cost, mask: solver(cost.cpu(), None if mask is None else mask.cpu()).to(cost.device)


def calls(case: Case) -> tuple[Tensor, Tensor | None, dict[str, Callable[[], Tensor]]]:
    """Costs and mask of a case, on the host, and every solver applied to them."""
    cost, mask = case.make(case.problems, case.rows, case.columns), None
    if case.ragged:
        counts = torch.randint(0, case.columns + 1, (case.problems, 1), generator=torch.Generator().manual_seed(0))
        mask = torch.arange(case.columns) < counts
    on_host = host_solvers(case)
    bound = {name: partial(solver, cost, mask) for name, solver in on_host.items()}
    if torch.cuda.is_available():
        gpu_cost, gpu_mask = cost.cuda(), None if mask is None else mask.cuda()
        on_gpu = {f"{name}, with copies": with_copies(solver) for name, solver in on_host.items()} | gpu_solvers(case)
        bound |= {name: partial(solver, gpu_cost, gpu_mask) for name, solver in on_gpu.items()}
    return cost, mask, bound


def worst_gap(assignment: Tensor, cost: Tensor, mask: Tensor | None) -> float:
    """How much a problem costs above its optimum, per pair and range of its costs, in the worst case."""
    found, best = assignment.cpu(), scipy_loop(cost, mask)
    if not (found >= 0).sum(-1).equal((best >= 0).sum(-1)):
        msg = "not as many pairs as SciPy has"
        raise ValueError(msg)
    found, best = (
        torch.where(a >= 0, cost.double().gather(-1, a.clamp(min=0)[..., None])[..., 0], 0.0).sum(-1)
        for a in (found, best)
    )
    spread = cost.double().amax((1, 2)) - cost.double().amin((1, 2))
    return ((found - best) / spread).max().item() / min(cost.shape[1:])


def run(case: Case) -> dict[str, object]:
    """Check, then time all solvers of a case."""
    cost, mask, functions = calls(case)
    first_call = {}
    for name, function in functions.items():
        start = time.perf_counter()
        assignment = function()
        synchronize()
        first_call[name] = 1e3 * (time.perf_counter() - start)
        if (gap := worst_gap(assignment, cost, mask)) > TOLERANCE:
            msg = f"{name} is {gap:.1e} of the range per pair above the optimum of {case.name}"
            raise ValueError(msg)
    return {"milliseconds": side_by_side(functions), "first_call_milliseconds": first_call}


def main() -> None:
    torch.set_num_threads(1)
    results = {}
    for case in CASES:
        if case.needs_gpu and not torch.cuda.is_available():
            continue
        print(f"\n{case.problems} problems: {case.name}\n{'':40}{'median':>10}{'min':>10}{'max':>10}{'first':>10}  ms")
        results[case.name] = {"problems": case.problems, **run(case)}
        for name, times in results[case.name]["milliseconds"].items():
            numbers = [*times.values(), results[case.name]["first_call_milliseconds"][name]]
            print(f"{name:40}" + "".join(f"{number:10.2f}" for number in numbers))
    print(save("assignment", {"cases": results}))


if __name__ == "__main__":
    main()
