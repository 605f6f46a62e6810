#!/usr/bin/env bash
# Runs all tests except the slow ones (-m slow), in a virtual environment of their own. Arguments
# are passed to pytest: bash launch/test.sh -k late
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment .venv-test "[test]"
run exec .venv-test/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
