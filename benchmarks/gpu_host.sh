#!/usr/bin/env bash
# On a GPU host without a network: `gpu_host.sh STACK_DIR STAGE...`, from the checkout's root.
# STACK_DIR is an unpacked site tree with SGLang's pinned packages; the plugin's wheel is in dist/.
# Stages: tests; features, with files of tests/gpu/features; kernels and transport, each
# benchmarks/STAGE/bench.py; counters (Nsight Compute); and those of benchmarks/serving/bench.py; each with its options.
# Results: ${OUT:-/tmp/out}.
set -uo pipefail
stack=$(cd "$1" && pwd)
stage=$2
shift 2
out=${OUT:-/tmp/out}
mkdir -p "$out"
wheel=$(ls -t dist/sglang_moe_plugin-*.whl | head -1) # the newest
# One folder per wheel: servers that outlive a command import from it.
site=${TMPDIR:-/tmp}/moe-plugin-site-$(sha256sum "$wheel" | cut -c1-16)
if [ ! -d "$site" ]; then # whole or not at all: several commands may start at once
    python3 -m zipfile -e "$wheel" "$site.$$"
    mv -T "$site.$$" "$site" 2>/dev/null || rm -rf "$site.$$"
fi
export PYTHONPATH=$stack:$site PYTHONUNBUFFERED=1
unset PYTHONDONTWRITEBYTECODE # a server's imports take 66 s without their bytecode, 36 s with it
nvshmem=$(python3 -c 'import nvidia, os; print([p for p in nvidia.__path__ if os.path.isdir(p + "/nvshmem")][0])')
export LD_LIBRARY_PATH=$stack/nvidia/nccl/lib:$nvshmem/nvshmem/lib:${LD_LIBRARY_PATH:-}
export NVSHMEM_REMOTE_TRANSPORT=none # one host, no RDMA
export PYTORCH_SKIP_CUDNN_COMPATIBILITY_CHECK=1 CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} HF_HUB_OFFLINE=1
case $stage in
tests) python3 -P -m pytest -m gpu tests/gpu -s -q --timeout 400 "$@" ;;
features) python3 -P -m pytest -m "gpu and not slow" -s -q "$@" ;;
kernels) cd benchmarks/kernels && python3 bench.py "$@" --out "$out" ;;
counters) cd benchmarks/kernels && python3 counters.py "$@" --out "$out" ;;
transport) python3 -P benchmarks/transport/bench.py --out "$out" "$@" ;;
start | up | rounds | client | checks | soak | trace | drift | down | pair | stock) python3 -P benchmarks/serving/bench.py "$stage" --out "$out" "$@" ;;
*) echo "unknown stage $stage: tests, features, kernels, counters, transport, start, up, rounds, client, checks, soak, trace, drift, down, pair or stock" >&2 && exit 1 ;;
esac
