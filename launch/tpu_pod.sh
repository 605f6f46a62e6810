#!/usr/bin/env bash
# A Cloud TPU VM or pod slice: copies the committed files to all workers and starts the same command
# on each. jax.distributed finds the workers by the machine's metadata. Needs gcloud with a login,
# and train.folder and data.folder on storage that all workers share.
#   bash launch/tpu_pod.sh [--dry-run] NAME ZONE COMMAND --config FILE [section.key=value ...]
#   bash launch/tpu_pod.sh pod-1 us-west4-a train --config configs/llama2_7b_chat.yaml mesh.fsdp=16
#   bash launch/tpu_pod.sh --here COMMAND ...     on a worker itself, or on a single TPU VM
# If python3 of the workers is older than 3.11, install a newer one there and name it:
# PYTHON=python3.11 bash launch/tpu_pod.sh ...
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
  echo "note: changes that are not committed are not copied" >&2
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
