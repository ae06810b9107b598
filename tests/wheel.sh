#!/usr/bin/env bash
# A newcomer's path with what a release would upload: build wheel and sdist, check them, install the wheel in a bare environment,
# and work from an empty folder.
#
#     PYTHON=python3 tests/wheel.sh
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/build"
"$folder/build/bin/python" -m pip install -q --disable-pip-version-check build twine
"$folder/build/bin/python" -m build --outdir "$folder/dist" "$root" >"$folder/printed" || { cat "$folder/printed"; exit 1; }
"$folder/build/bin/python" -m twine check --strict "$folder"/dist/*
"$folder/build/bin/python" - "$folder"/dist/*.whl <<'PYTHON'
import sys
import zipfile

names = zipfile.ZipFile(sys.argv[1]).namelist()
strangers = [name for name in names if not name.startswith(("detr_kd_losses/", "detr_kd_losses-"))]
assert not strangers, f"more than the package: {strangers}"
assert "detr_kd_losses/py.typed" in names, "no py.typed"
print(f"{len(names)} files, the package alone, typed")
PYTHON

"${PYTHON:-python3}" -m venv "$folder/user"
"$folder/user/bin/python" -m pip install -q --disable-pip-version-check -c "$root/constraints.txt" "$folder"/dist/*.whl
mkdir "$folder/empty" && cd "$folder/empty"
# The first block of Python in the README, as it stands there.
awk '/^```python$/ {on = 1; next} /^```$/ {if (on) exit} on' "$root/README.md" >first.py
"$folder/user/bin/python" -W error first.py
echo "README: its first lines run with torch, numpy and scipy alone"
{ "$folder/user/bin/python" -c "import detr_kd_losses.testing" 2>&1 || true; } | grep "pip install 'detr-kd-losses\[testing\]'"
"$folder/user/bin/python" -m pip install -q --disable-pip-version-check -c "$root/constraints.txt" hypothesis matplotlib
"$folder/user/bin/python" - <<'PYTHON'
import torch
from matplotlib.figure import Figure

import detr_kd_losses as dkl
from detr_kd_losses import plotting, testing

figure = Figure()
plotting.plot_mask(torch.rand(3, 8, 8), torch.rand(4, 4), ax=figure.subplots())
figure.savefig("mask.png")


def wrong(cost, *, row_mask=None, column_mask=None):
    return torch.full(cost.shape[:-1], -1)


report = testing.law_report(testing.ASSIGNMENT_LAWS, wrong, max_examples=5)
assert not report.kept and testing.law_report(testing.ASSIGNMENT_LAWS, dkl.linear_sum_assignment, max_examples=5).kept
print("plot drawn, a wrong solver caught:", ", ".join(report.names("broken")))
PYTHON
