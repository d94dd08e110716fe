# Sourced by run.sh, test.sh and .ci/run, which call `setup_environment`.
#
# It makes $ROOT/.venv from python3 (or $PYTHON) with the pinned packages of
# constraints.txt and an editable install of the project. A stamp, written last,
# holds the hash of all that the environment depends on:
#   stamp matches  -> nothing to do;
#   stamp differs  -> packages are brought up to date in place;
#   no stamp       -> an earlier attempt was cut short: start afresh.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

environment_hash() {
    # The root counts too: an editable install and a venv's scripts hold its path.
    {
        echo "$ROOT"
        "${PYTHON:-python3}" --version
        cat "$ROOT/pyproject.toml" "$ROOT/scripts/constraints.txt"
    } | sha256sum | cut -d ' ' -f 1
}

setup_environment() {
    local stamp="$VENV/.tn_kfac_stamp" want
    want="$(environment_hash)"
    if [[ -f "$stamp" && "$(<"$stamp")" == "$want" ]]; then
        return
    fi
    echo "Setting up $VENV (the first time takes a minute or two)." >&2
    [[ -f "$stamp" ]] || rm -rf "$VENV"
    rm -f "$stamp"
    "${PYTHON:-python3}" -m venv "$VENV"
    "$VENV/bin/python" -m pip install -qq --disable-pip-version-check \
        --constraint "$ROOT/scripts/constraints.txt" --editable "$ROOT[train,dev]"
    echo "$want" >"$stamp"
}
