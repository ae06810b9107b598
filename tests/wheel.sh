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
import re
import sys
import zipfile

wheel = zipfile.ZipFile(sys.argv[1])
names = wheel.namelist()
strangers = [name for name in names if not name.startswith(("detr_kd_losses/", "detr_kd_losses-"))]
assert not strangers, f"more than the package: {strangers}"
assert "detr_kd_losses/py.typed" in names, "no py.typed"
page = wheel.read(next(name for name in names if name.endswith("/METADATA"))).decode()
assert "```python" in page, "the README is not the page of the index"
broken = re.findall(r"\]\((?!https?:)[^)]*\)", page)
assert not broken, f"links that break on an index: {broken}"
print(f"{len(names)} files, the package alone, typed; no link on its page breaks")
PYTHON

"${PYTHON:-python3}" -m venv "$folder/user"
wheel=$(ls "$folder"/dist/*.whl)
"$folder/user/bin/python" -m pip install -q --disable-pip-version-check -c "$root/constraints.txt" "$wheel"
mkdir "$folder/empty" && cd "$folder/empty"
# The first block of Python in the README, as it stands there.
awk '/^```python$/ {on = 1; next} /^```$/ {if (on) exit} on' "$root/README.md" >first.py
"$folder/user/bin/python" -W error first.py
echo "README: its first lines run with torch, numpy and scipy alone"
"$folder/user/bin/python" - "$root/examples/notebooks/first_loss.ipynb" <<'PYTHON'
import json
import sys
from pathlib import Path

cells = json.loads(Path(sys.argv[1]).read_text())["cells"]
namespace = {}
for cell in cells:
    if cell["cell_type"] == "code" and "raises-exception" not in cell["metadata"].get("tags", []):
        exec("".join(cell["source"]), namespace)
print("first notebook: runs")
PYTHON
{ "$folder/user/bin/python" -c "import detr_kd_losses.testing" 2>&1 || true; } | grep "pip install 'detr-kd-losses\[testing\]'"
"$folder/user/bin/python" -m pip install -q --disable-pip-version-check -c "$root/constraints.txt" "${wheel}[plot,testing]"
"$folder/user/bin/python" - <<'PYTHON'
import torch
from matplotlib.figure import Figure

import detr_kd_losses as dkl
from detr_kd_losses import plotting, testing

figure = Figure()
teacher, student = (dkl.Predictions(torch.randn(1, count, 3), torch.rand(1, count, 4)) for count in (9, 5))
assignment = dkl.match_teacher(*student, *teacher)
plotting.plot_matching(torch.rand(3, 8, 8), student, teacher, assignment, ax=figure.subplots())
figure.savefig("matching.png")


def wrong(student_logits, student_boxes, teacher_logits, teacher_boxes, assignment):
    return (student_boxes - teacher_boxes[..., : student_boxes.shape[-2], :]).square().mean()


laws = testing.HUNGARIAN_DISTILLATION_LAWS
report = testing.law_report(laws, wrong, max_examples=5)
assert "teacher_detached" in report.names("broken")
assert testing.law_report(laws, dkl.hungarian_distillation_loss, max_examples=5).kept
print("plot drawn, a wrong loss caught:", ", ".join(report.names("broken")))
PYTHON
