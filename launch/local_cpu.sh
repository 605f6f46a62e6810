#!/usr/bin/env bash
# The program of a pod on eight virtual CPU devices, to try a mesh without accelerators. The devices
# share the cores, so nothing is faster.
#   bash launch/local_cpu.sh [--dry-run] COMMAND --config FILE [section.key=value ...]
#   bash launch/local_cpu.sh train --config configs/quickstart.yaml mesh.fsdp=4 mesh.tensor=2
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
[ $# -gt 0 ] || stop "which command? bash launch/local_cpu.sh train --config configs/quickstart.yaml"
make_environment .venv ""
run env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 .venv/bin/python -m "beagle_jax.$1" "${@:2}"
