#!/usr/bin/env bash
# The feature tests in several processes at once, on two GPUs or on several pairs of them:
# `features.sh STACK [SECONDS [GROUP...]]`, from the checkout's root; a group, such as "eplb weights", is one process.
# speculation/3-1/1-1 alone in its group are those of a module's tests whose names have 3-1 or 1-1 in them.
# Each test's outcome is written as it ends, so that a time limit loses only what still runs. All that comes of it is
# one archive, ${OUT:-/tmp/out}/features.tgz, written anew every half minute: the record, what each group said, logs.
set -uo pipefail
stack=$1
limit=${2:-1500}
shift $(($# < 2 ? $# : 2))
out=${OUT:-/tmp/out}
OUT=$(mktemp -d)
export OUT
mkdir -p "$out"
groups=("$@")
[ $# -gt 0 ] || groups=(
    "speculation"
    "eplb two_batch_overlap"
    "disaggregation auto_mode"
    "attention_tp failures"
    "weights deterministic"
    "round_trips long_contexts client" # the first needs no server, so it goes while the others start
)
for group in "${groups[@]}"; do # pytest has one filter for all files of a process
    [[ $group != *" "*"/"* && $group != *"/"*" "* ]] || { echo "got '$group': a group with / names one module" >&2 && exit 1; }
done
pairs=$(($(nvidia-smi -L | wc -l) / 2))
[ "$pairs" -gt 0 ] || { echo "requires 2 or more GPUs" >&2 && exit 1; }

archive() { # whole or not at all; without the servers' logs where these would be too much to carry
    local records=("$OUT"/features-*.json)
    [ -e "${records[0]}" ] && python3 -P benchmarks/features.py "${records[@]}" --out "$OUT/record.json" >"$OUT/table.txt"
    tar -czf "$out/.features.tgz" -C "$OUT" .
    [ "$(stat -c %s "$out/.features.tgz")" -lt 15000000 ] || tar -czf "$out/.features.tgz" -C "$OUT" --exclude ./logs .
    mv "$out/.features.tgz" "$out/features.tgz"
}

pids=()
for number in "${!groups[@]}"; do
    group=${groups[$number]}
    first=$((2 * (number % pairs)))
    files=()
    for name in $group; do
        files+=("tests/gpu/features/test_${name%%/*}.py")
        [[ $name != */* ]] || { only=${name#*/} && files+=(-k "${only//\// or }"); }
    done
    CUDA_VISIBLE_DEVICES=$first,$((first + 1)) timeout -k 20 "$limit" \
        benchmarks/gpu_host.sh "$stack" features "${files[@]}" >"$OUT/features-${group//[ \/]/-}.txt" 2>&1 &
    pids+=($!)
done
trap 'kill "${pids[@]}" 2>/dev/null' TERM INT
until=$((SECONDS + 30))
while kill -0 "${pids[@]}" 2>/dev/null; do
    sleep 1
    [ $SECONDS -lt $until ] || { archive && until=$((SECONDS + 30)); }
done
archive
tail -n 4 "$OUT"/features-*.txt
cat "$OUT/table.txt"
