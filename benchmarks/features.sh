#!/usr/bin/env bash
# The feature tests in six processes at once, on two GPUs or on several pairs of them:
# `features.sh STACK [SECONDS]`, from the checkout's root. Each test's outcome is written as it ends,
# so that a time limit loses only what still runs. Results and logs: ${OUT:-/tmp/out}; join them with benchmarks/features.py.
set -uo pipefail
stack=$1
limit=${2:-1500}
export OUT=${OUT:-/tmp/out}
mkdir -p "$OUT"
groups=(
    "speculation"
    "eplb two_batch_overlap"
    "disaggregation auto_mode"
    "attention_tp failures"
    "weights deterministic"
    "long_contexts client round_trips"
)
[ -n "${FEATURES:-}" ] && groups=("$FEATURES")
pairs=$(($(nvidia-smi -L | wc -l) / 2))
[ "$pairs" -gt 0 ] || { echo "requires 2 or more GPUs" >&2 && exit 1; }
for number in "${!groups[@]}"; do
    group=${groups[$number]}
    first=$((2 * (number % pairs)))
    export CUDA_VISIBLE_DEVICES=$first,$((first + 1))
    files=()
    for name in $group; do files+=("tests/gpu/features/test_$name.py"); done
    timeout -k 20 "$limit" benchmarks/gpu_host.sh "$stack" features "${files[@]}" \
        >"$OUT/features-${group// /-}.txt" 2>&1 &
done
wait
tail -n 4 "$OUT"/features-*.txt
