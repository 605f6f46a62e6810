#!/usr/bin/env bash
# One host with 1 to 8 NVIDIA GPUs (driver 580 or newer, for CUDA 13): one process, all GPUs in its
# mesh.
#   bash launch/gpu.sh [--dry-run] [--gpus N] COMMAND --config FILE [section.key=value ...]
#   bash launch/gpu.sh --gpus 4 train --config configs/llama3_8b_instruct.yaml
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
devices=()
if [ "${1:-}" = "--gpus" ]; then
  [[ "${2:-}" =~ ^[1-8]$ ]] || stop "--gpus is ${2:-missing}; expected 1 to 8"
  devices=("CUDA_VISIBLE_DEVICES=$(seq --separator=, 0 $(($2 - 1)))")
  shift 2
fi
[ $# -gt 0 ] || stop "which command? bash launch/gpu.sh train --config configs/llama3_8b_instruct.yaml"
if [ -z "$dry_run" ] && ! command -v nvidia-smi > /dev/null; then
  stop "no NVIDIA driver: nvidia-smi is missing; on a CPU use launch/local_cpu.sh"
fi
make_environment .venv-gpu "[gpu]"
# CUDA or an error: a CPU would take months.
run env JAX_PLATFORMS=cuda,cpu "${devices[@]}" .venv-gpu/bin/python -m "beagle_jax.$1" "${@:2}"
