#!/usr/bin/env bash
# Everything that a GPU host can show, in one go: `all.sh STACK_DIR`, see gpu_host.sh. About 40 minutes on
# one H100 with 16 cores, most of it load on servers. Results and logs: ${OUT:-/tmp/out}; every step keeps
# what it has when the machine goes away. The last lines are a short table.
set -uo pipefail
stack=$1
here=$(dirname "$0")
export OUT=${OUT:-/tmp/out}
mkdir -p "$OUT"
table=

step() { # NAME STAGE OPTIONS...: log, seconds and exit code; a failed step does not stop the others
    local name=$1 began=$SECONDS code
    shift
    "$here/gpu_host.sh" "$stack" "$@" >"$OUT/$name.log" 2>&1
    code=$?
    table+=$(printf '%-16s exit %d, %d s' "$name" $code $((SECONDS - began)))$'\n'
    return $code
}

step tests tests
# No figure from kernels that are not right.
if step kernels-check kernels check; then
    step kernels-sweep kernels sweep # a table, in $OUT; the bars are measured on the shipped one
    step kernels-bars kernels bars
    step kernels-compile kernels compile
fi
step transport transport
step up up --cold --variants a b c
step checks checks
step drift drift
step rounds rounds --variants b c a --seldom a --budget 1500
step client client --variants b c --points chat/64 chat@16
step down down
step up-warm up --one-by-one --quick --variants b c
step down-warm down
step stock stock
grep -hE "^(ok  |MISS|VOID)" "$OUT"/*.log | sort -u
echo "$table"
