"""Write docs/explanation/matching.md from the results of `assignment.py`, one section per device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from measure import RESULTS

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "matching.md"

HEAD = """# How fast is matching?

<!-- Written by examples/benchmarks/matching_page.py: edit that, not this. -->

Milliseconds for all problems of a training step: median of the runs taken in turns, smallest and largest in
brackets, and how many times as fast as a loop over SciPy. "KD" are student queries against teacher queries, "GT"
queries against ground truths, both with costs as detectors produce them; uniform random costs are easier and stand here
for comparison. Every solver's result is checked against SciPy's float64 optimum first. `package, x` is
`linear_sum_assignment(backend="x")`, finite checks and masks included.

```sh
python examples/benchmarks/assignment.py      # measures; with a GPU, pip install torch-linear-assignment==0.1.0 first
python examples/benchmarks/matching_page.py   # writes this page
```
"""

NO_GPU = """
No results of a GPU are here yet. The Triton backend is tested in Triton's interpreter and compiled for sm_90; its
speed is not measured, and nothing is claimed of it. The first command above measures it where there is a GPU, beside
torch-linear-assignment, each host solver with and without the copies.
"""


def page() -> str:
    """The whole page."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("assignment--*.json"))]
    on_gpu = any("package, triton" in case["milliseconds"] for result in results for case in result["cases"].values())
    return "\n".join([HEAD, *map(device_section, results)]) + ("" if on_gpu else NO_GPU)


def device_section(result: dict[str, Any]) -> str:
    """What was measured on one device."""
    environment = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    lines = [
        f"## {environment['device']}, {environment['cpus']} CPU cores",
        "",
        f"Python {environment['python']}, {versions}.",
    ]
    for name, case in result["cases"].items():
        lines += [
            "",
            f"**{case['problems']} problems: {name}**",
            "",
            "| solver | ms | against the loop |",
            "|---|---|---|",
        ]
        loop = case["milliseconds"]["SciPy loop"]["median"]
        for solver, times in case["milliseconds"].items():
            spread = f"{times['median']:.2f} [{times['min']:.2f}, {times['max']:.2f}]"
            lines.append(f"| {solver} | {spread} | {loop / times['median']:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
