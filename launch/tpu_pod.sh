#!/usr/bin/env bash
# A Cloud TPU VM or pod slice: what is committed here is copied to all workers, and all start the
# same command; jax.distributed finds the others by the machine's metadata. Needs gcloud, logged in,
# and train.folder and data.folder on storage that all workers see.
#   bash launch/tpu_pod.sh [--dry-run] NAME ZONE COMMAND --config FILE [section.key=value ...]
#   bash launch/tpu_pod.sh pod-1 us-west4-a train --config configs/llama2_7b_chat.yaml mesh.fsdp=16
#   bash launch/tpu_pod.sh --here COMMAND ...     on a worker itself, or on a single TPU VM
# Where the workers' python3 is older than 3.11, install one there and name it: PYTHON=python3.11
# bash launch/tpu_pod.sh ...
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
if [ "${1:-}" = "--here" ]; then
  [ $# -gt 1 ] || stop "which command? bash launch/tpu_pod.sh --here train --config configs/llama2_7b_chat.yaml"
  make_environment .venv-tpu "[tpu]"
  run env JAX_PLATFORMS=tpu,cpu .venv-tpu/bin/python -m "beagle_jax.$2" "${@:3}"
  exit
fi
[ $# -gt 2 ] || stop "expected NAME ZONE COMMAND, for example: bash launch/tpu_pod.sh pod-1 us-west4-a train --config FILE"
name=$1 zone=$2
archive=beagle_jax.tar.gz
if [ -n "$(git status --porcelain)" ]; then
  echo "note: changes that are not committed stay here" >&2
fi
on_all=(gcloud compute tpus tpu-vm)
run git archive --output="$archive" HEAD
run "${on_all[@]}" scp "$archive" "$name:$archive" --zone="$zone" --worker=all
together=()
[ "$3" != train ] || together=(--distributed)
python=()
[ -z "${PYTHON:-}" ] || python=(env "PYTHON=$PYTHON")
printf -v command '%q ' "${python[@]}" bash launch/tpu_pod.sh --here "$3" "${together[@]}" "${@:4}"
run "${on_all[@]}" ssh "$name" --zone="$zone" --worker=all \
  --command="mkdir -p beagle_jax && tar -xzf $archive -C beagle_jax && cd beagle_jax && $command"
run rm "$archive"
