#!/usr/bin/env bash
# The main job: sets up the environment, then compares the optimizers on the
# handwritten digits and writes table, curves and results to runs/.
#   scripts/run.sh                       the full comparison
#   scripts/run.sh --quick               a short one, to see that all works
#   scripts/run.sh --training.epochs 5   other arguments go to compare.py
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

configs=(--config "$ROOT/configs/digits.yaml")
arguments=()
for argument in "$@"; do
    if [[ "$argument" == "--quick" ]]; then
        configs+=(--config "$ROOT/configs/digits_quick.yaml")
    else
        arguments+=("$argument")
    fi
done

setup_environment
exec "$VENV/bin/python" "$ROOT/scripts/compare.py" "${configs[@]}" ${arguments[@]+"${arguments[@]}"}
