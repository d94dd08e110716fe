#!/usr/bin/env bash
# Sets up the environment, then runs pytest; arguments go to pytest:
#   scripts/test.sh                      everything but the nightly tests
#   scripts/test.sh -m nightly           the nightly tests only
#   scripts/test.sh -n 0 -k structures   one process, some tests
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

setup_environment
cd "$ROOT"
# One thread a worker: pytest-xdist already starts one worker a core.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" exec "$VENV/bin/python" -m pytest "$@"
