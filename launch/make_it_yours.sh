#!/usr/bin/env bash
# Trains the drafter in the box further on your own prompts, planned for ten minutes on two CPU
# cores. The target answers them, and the draft learns these answers. Your last 20 prompts, which
# the draft has not seen, are then answered without a draft, with yours, and with the box.
#   bash launch/make_it_yours.sh [--dry-run] PROMPTS.jsonl [section.key=value ...]
# PROMPTS.jsonl has one {"prompt": ".."}, or one chat that waits for an answer, on each line.
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
source launch/environment.sh
held_out=20
prompts=${1:-}
case $prompts in
  *.jsonl) shift ;;
  *) stop "which prompts? bash launch/make_it_yours.sh PROMPTS.jsonl, one {\"prompt\": ..} a line" ;;
esac
case $prompts in /*) ;; *) prompts=$here/$prompts ;; esac
folder=runs/make_it_yours
if [ -z "$dry_run" ]; then
  [ -f "$prompts" ] || stop "$prompts is not there"
  mkdir -p $folder
  count=$(awk 'NF { n++ } END { print n + 0 }' "$prompts")  # without empty lines
  least=$((3 * held_out))
  [ "$count" -ge $least ] ||
    stop "$prompts has $count prompts; expected $least or more, as $held_out are held out"
  awk -v last=$((count - held_out)) 'NF && ++n <= last' "$prompts" > $folder/prompts.jsonl
  awk -v last=$((count - held_out)) 'NF && ++n > last' "$prompts" > $folder/held_out.jsonl
fi
make_environment .venv ""
export PYTHONUNBUFFERED=1
config=configs/make_it_yours.yaml
source=data.source=$folder/prompts.jsonl
on_each_half .venv/bin/python -m beagle_jax.prepare --config $config $source "$@"
run .venv/bin/python -m beagle_jax.train --config $config $source "$@"
suites="eval.suites=[$folder/held_out.jsonl]"
run .venv/bin/python -m beagle_jax.evaluate --config $config "$suites" "$@"
if [ -z "$dry_run" ]; then
  echo "to chat with the model: source .venv/bin/activate &&" \
    "python -m beagle_jax.generate --config $config --chat"
fi
