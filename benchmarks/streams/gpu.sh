#!/bin/sh
# Runs of ablation.py or suite.py side by side on one GPU, with what they leave in results/ in one archive.
#
#   sh benchmarks/streams/gpu.sh OUT SECONDS tests
#   sh benchmarks/streams/gpu.sh OUT SECONDS ablation --streams mini-imagenet-50 --cells best --seeds 0 --jobs 16 …
#   sh benchmarks/streams/gpu.sh OUT SECONDS suite --streams mini-imagenet --methods best joint --seeds 0 1 2 --jobs 16 …
#
# OUT: folder for the log and the archive. After SECONDS what is under way is ended; what has a result is in the archive,
# and a run that was ended goes on where --runs is the same. tests: tests/test_gpu.py, one process for each core.
# --jobs processes share the GPU through NVIDIA's multi-process service where the machine has it: a step of a small model
# fills neither the GPU nor a core's time on it.
set -u
out=$1 seconds=$2 what=$3
shift 3
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root" || exit 1
mkdir -p "$out"
export PYTHONPATH="$root:$root/tests${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
if command -v nvidia-cuda-mps-control >/dev/null && [ -z "${CUDA_MPS_PIPE_DIRECTORY:-}" ]; then
    export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps CUDA_MPS_LOG_DIRECTORY=/tmp/mps-log
    mkdir -p /tmp/mps /tmp/mps-log
    nvidia-cuda-mps-control -d
fi
begun=$(mktemp)
case $what in
tests)
    PM_HF_TEST_GPU=1 timeout "$seconds" python3 -m pytest tests/test_gpu.py -q -n "$(nproc)" -p no:cacheprovider >"$out/tests.log" 2>&1
    ;;
*)
    timeout "$seconds" python3 "benchmarks/streams/$what.py" "$@" >"$out/$what.log" 2>&1
    ;;
esac
code=$?
find results -newer "$begun" -type f >"$begun.files"
tar -czf "$out/results.tgz" -T "$begun.files"
echo "$(wc -l <"$begun.files") files of results, exit status $code"
tail -c 3000 "$out"/*.log | tr '\r' '\n' | tail -n 25
exit $code
