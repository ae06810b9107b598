#!/usr/bin/env bash
# Tests in the trainers themselves: RF-DETR, pydfine, Ultralytics and LibreYOLO as they are on PyPI, in a folder of their own that is
# removed. Without their requirements, which would replace the PyTorch that is there; torchvision's wheel is for CUDA and
# is made to import beside a PyTorch for the CPU.
#
#     tests/trainers.sh PYTHON                          # the tests
#     tests/trainers.sh PYTHON tests/trainers/cost.py   # or a script, with its arguments
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$python" -m pip install -q --disable-pip-version-check --no-deps --target "$folder" \
  torchvision==0.28.0 rfdetr==1.11.2 pydfine==0.2.1 ultralytics==8.4.190 libreyolo==1.6.0 \
  requests certifi charset-normalizer urllib3 supervision pyDeprecate defusedxml opencv-python-headless \
  polars polars-runtime-32 pandas peft pydantic pydantic-core annotated-types typing-inspection \
  faster-coco-eval pycocotools hotcoco
export TRAINERS=1 PYTHONPATH=$PWD/tests:$PWD/examples:$folder${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
export YOLO_CONFIG_DIR=$folder YOLO_OFFLINE=true
if [ $# -eq 0 ]; then set -- -m pytest -q -p no:cacheprovider tests/trainers; else set -- -W ignore "$@"; fi
"$python" "$@"
