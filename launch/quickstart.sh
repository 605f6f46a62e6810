#!/usr/bin/env bash
# All steps on two CPU cores and 8 GB: a real chat model writes training text, a drafter is trained
# on it, a draft tree is chosen for this machine, and the model answers faster with this drafter.
# About 20 minutes; --short takes 4 minutes, which is too little training for a speedup.
#   bash launch/quickstart.sh [--dry-run] [--short] [section.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
short=()
if [ "${1:-}" = "--short" ]; then
  shift
  short=(data.answer_tokens=2000 data.folder=runs/quickstart-short/data train.folder=runs/quickstart-short
         train.early.steps=20 train.late.steps=10 train.early.warmup=5 train.late.warmup=3 train.checkpoint_every=10
         log.eval_rows=0 eval.limit=4 eval.max_new_tokens=32)
fi
make_environment .venv ""
export PYTHONUNBUFFERED=1
config=configs/quickstart.yaml
on_each_half .venv/bin/python -m beagle_jax.prepare --config $config "${short[@]}" "$@"
run .venv/bin/python -m beagle_jax.train --config $config "${short[@]}" "$@"
run .venv/bin/python -m beagle_jax.tune --quick --config $config "${short[@]}" "$@"
run .venv/bin/python -m beagle_jax.evaluate --config $config "${short[@]}" "$@"
if [ -n "$dry_run" ]; then
  exit
fi
if [ ${#short[@]} -gt 0 ]; then
  echo "--short trains too little for a speedup; the whole run: bash launch/quickstart.sh"
else
  echo "to chat with the model: source .venv/bin/activate && python -m beagle_jax.generate --config $config --chat $*"
fi
