#!/usr/bin/env bash
# The tests but the slow ones (-m slow), in a virtual environment of their own. Arguments go to
# pytest: bash launch/test.sh -k late
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment .venv-test "[test]"
run exec .venv-test/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
