#!/usr/bin/env bash
# Everything that wants a GPU, in one go of at most 29 minutes: see usage below, or benchmarks/gpu.sh --help.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: benchmarks/gpu.sh [--only STEP[,STEP...]] [OUTPUT [WHEELS]] [-- ARGUMENTS]

Steps, each with its own time limit, its log OUTPUT/gpu-STEP.log and a line in OUTPUT/gpu-status.txt; a failed one does not stop the rest:

  environment   1 min    GPU, driver, versions
  tests         7 min    the tests marked gpu in tests/kernels
  kernels      10 min    benchmarks/kernels_gpu.py; rows are appended to OUTPUT/kernels.csv
  attention     4 min    the tests marked gpu of tests/models/test_attention.py, then benchmarks/attention.py
  training      7 min    benchmarks/train_gpu.py, where it is there

OUTPUT      folder of results; default benchmarks/results
WHEELS      folder of wheels, installed in a temporary folder, for a host without a package index
ARGUMENTS   for benchmarks/kernels_gpu.py, such as --quick
PYTHON      environment variable: the interpreter, which must have torch; default python3

Nothing needs to be installed: megapd and megapd_kernels are taken from this checkout. Exits with 0, with 1 if a step failed, with 2
for wrong arguments or without a GPU.
TEXT
}

fail() {
    echo "gpu.sh: $1" >&2
    exit 2
}

steps=(environment tests kernels attention training)
only=""
places=()
benchmark_arguments=()
while (($#)); do
    case $1 in
        -h | --help)
            usage
            exit 0
            ;;
        --only)
            (($# > 1)) || fail "--only: needs the name of a step"
            only=$2
            shift
            ;;
        --)
            shift
            benchmark_arguments=("$@")
            break
            ;;
        -*) fail "$1: no such option; --help lists them" ;;
        *) places+=("$1") ;;
    esac
    shift
done
((${#places[@]} <= 2)) || fail "${places[2]}: at most OUTPUT and WHEELS are taken; --help explains"
if [[ -n $only ]]; then
    known=" ${steps[*]} "
    IFS=, read -ra steps <<<"$only"
    for step in "${steps[@]}"; do
        [[ $known == *" $step "* ]] || fail "--only: $step is not one of$known"
    done
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}") || fail "PYTHON: there is no ${PYTHON:-python3}"
[[ $python == /* ]] || python=$PWD/$python
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || fail "needs a GPU: $python has no torch that sees one"

output=${places[0]:-$root/benchmarks/results}
mkdir -p "$output"
output=$(cd "$output" && pwd)
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT

if ((${#places[@]} == 2)); then
    wheels=("${places[1]}"/*.whl)
    [[ -e ${wheels[0]} ]] || fail "${places[1]}: holds no wheels"
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$temporary/site" "${wheels[@]}"
fi

cd "$root"
export PYTHONPATH=$root:$root/kernels:$temporary/site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# shellcheck disable=SC2329 # by bash -c, under timeout
environment() {
    date --iso-8601=seconds
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi
        nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit --format=csv
    fi
    "$python" - <<'PYTHON'
import importlib.metadata
import platform

import torch

import megapd_kernels

print("python", platform.python_version(), "cuda", torch.version.cuda, "hip", torch.version.hip)
for name in ("torch", "triton", "liger-kernel", "deepspeed", "numpy", "pytest", "hypothesis"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
properties = torch.cuda.get_device_properties(0)
print(properties)
print("kernels:", megapd_kernels.implementation(torch.device("cuda"), torch.float32), "from", megapd_kernels.__file__)
PYTHON
}

# shellcheck disable=SC2329 # by bash -c, under timeout
attention() {
    "$python" -m pytest -m gpu -o cache_dir="$temporary/cache" tests/models/test_attention.py || return
    "$python" benchmarks/attention.py --output "$output/attention.json"
}

failed=0
# run STEP SECONDS COMMAND...: its output to the log and the terminal, its end to the status file.
run() {
    local step=$1 seconds=$2 started=$SECONDS code=0 outcome
    shift 2
    [[ " ${steps[*]} " == *" $step "* ]] || return 0
    # 30 s after the limit it is killed, whatever it is at.
    timeout --kill-after=30 "$seconds" "$@" 2>&1 | tee "$output/gpu-$step.log" || code=$?
    case $code in
        0) outcome=ok ;;
        124 | 137) outcome="over its limit of $seconds s" ;;
        *) outcome="failed with $code" ;;
    esac
    ((code == 0)) || failed=1
    printf '%-12s %4d s  %s\n' "$step" $((SECONDS - started)) "$outcome" | tee -a "$output/gpu-status.txt"
}

: >"$output/gpu-status.txt"
export -f environment attention
export python temporary output
run environment 60 bash -c environment
run tests 420 "$python" -m pytest -m gpu --durations=10 -o cache_dir="$temporary/cache" tests/kernels
run kernels 600 "$python" benchmarks/kernels_gpu.py --output "$output/kernels.csv" "${benchmark_arguments[@]}"
run attention 240 bash -c attention
if [[ -e benchmarks/train_gpu.py ]]; then
    run training 420 "$python" benchmarks/train_gpu.py --output "$output/train_gpu.json"
elif [[ " ${steps[*]} " == *" training "* ]]; then
    echo "training: there is no benchmarks/train_gpu.py"
fi
exit "$failed"
