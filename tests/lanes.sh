#!/usr/bin/env bash
# The core tests (all but those of the examples) on three sets of versions: the lowest that pyproject.toml allows, those
# that constraints.txt pins, and the newest that there are. Each lane has a virtual environment of its own, outside of
# the project, and removes it: PyTorch for CUDA takes gigabytes.
#
#     tests/lanes.sh                                  # all three
#     tests/lanes.sh lowest newest                    # some
#     PYTHONS=/opt/python3.14 tests/lanes.sh newest   # with another Python than the first that is found
set -euo pipefail
cd "$(dirname "$0")/.."
export CI=true OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

run_lane() { # its name, what it installs, its constraints, its Pythons
  local lane=$1 requirements=$2 constraints=$3 pythons=${PYTHONS:-$4} bin=$folder/venv/bin python="" status=0
  for python in $pythons ""; do
    if [ -n "$python" ] && "$python" -c "" 2>/dev/null; then break; fi
  done
  if [ -z "$python" ]; then
    echo "$lane: none of these Pythons runs: $pythons"
    return 1
  fi
  "$python" -m venv "$folder/venv" || return
  # shellcheck disable=SC2086  # several requirements
  "$bin/python" -m pip install -q --disable-pip-version-check -c "$constraints" $requirements || return
  echo "$lane: $("$bin/python" -V), $("$bin/python" -m pip list --format=freeze --disable-pip-version-check |
    grep -E '^(torch|triton|numpy|scipy|lapx|safetensors|matplotlib|hypothesis)==' | sed 's/==/ /' | paste -sd , | sed 's/,/, /g')"
  "$bin/python" -m pytest -q -p no:cacheprovider -n auto --dist loadfile --ignore tests/examples \
    >"$folder/printed" 2>&1 || status=$?
  if [ $status -ne 0 ]; then cat "$folder/printed"; fi
  # What is on disk outlives an update: each lane reads the files of those before it.
  "$bin/python" tests/support/kept_files.py "$folder/kept" | sed "s/^/$lane: /" || status=$?
  echo "$lane: $(tail -n 1 "$folder/printed")"
  rm -rf "$folder/venv"
  return $status
}

# A lower bound as an exact version: torch>=2.6 becomes torch==2.6.
grep -oE '"(torch|numpy|scipy|hypothesis|lapx|safetensors|matplotlib)>=[0-9.]+"' pyproject.toml | tr -d '"' | sed 's/>=/==/' >"$folder/lowest.txt"
echo "pyparsing<3.3" >>"$folder/lowest.txt" # later ones warn of how Matplotlib 3.8 calls them

if [ $# -eq 0 ]; then set -- lowest pinned newest; fi
failed=0
for lane; do
  case $lane in
    lowest) run_lane lowest "-e .[fast,offline,plot,testing] pytest pytest-xdist" "$folder/lowest.txt" python3.10 ;;
    pinned) run_lane pinned "-e .[fast,offline,plot,testing] pytest pytest-xdist triton" constraints.txt python3.11 ;;
    newest) run_lane newest "-e .[fast,offline,plot,testing] pytest pytest-xdist" /dev/null "python3.14 python3.13 python3.12" ;;
    *) echo "no lane $lane: lowest, pinned, newest" && false ;;
  esac || failed=1
done
exit $failed
