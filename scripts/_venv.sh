# Sourced by the scripts beside it: finds Python, makes .venv once, installs the pinned packages once.
#
# After `prepare_venv runtime` (or `dev`), `python` and `fedscan` are those of .venv. What was installed is
# remembered in a stamp file, so a second run takes no time. pip's own settings (PIP_INDEX_URL,
# PIP_FIND_LINKS, PIP_CONSTRAINT, pip.conf, ...) apply: where packages come from is the user's decision.

set -o pipefail # an install that failed must not look like one that worked
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"

# Nothing here calls home.
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 RAY_USAGE_STATS_ENABLED=0

trap 'printf "\nStopped. Run it again: what was finished is kept.\n" >&2; exit 130' INT

die() {
    printf '%s\n' "$@" >&2
    exit 2
}

# Prints the first Python that is new enough and can make virtual environments. PYTHON=... goes first.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
            >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    die "No Python 3.11 or newer with the venv module was found." \
        "Install one (on Debian and Ubuntu: python3 and python3-venv), or name it: PYTHON=/path/to/python3 $0"
}

# On a terminal, one line that says what pip is doing; elsewhere silence, the log has it all.
show_progress() {
    local line
    while IFS= read -r line; do
        if [ -t 1 ]; then
            case "$line" in
                *Collecting* | *Downloading* | *Processing* | *Installing*)
                    printf '\r\033[K  %s' "${line:0:76}"
                    ;;
            esac
        fi
    done
    if [ -t 1 ]; then printf '\r\033[K'; fi
}

# prepare_venv runtime|dev
prepare_venv() {
    local what="$1" target=. found python_found log=.venv/install.log
    if [ "$what" = dev ]; then target='.[dev,ray]'; fi

    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python_found="$(find_python)"
        echo "Making .venv with $("$python_found" --version)."
        "$python_found" -m venv --clear .venv
    fi
    PATH="$ROOT/.venv/bin:$PATH"

    # The place counts too: an editable install points at the folder it was made from.
    found="$(cat pyproject.toml constraints.txt | cksum) $ROOT"
    if [ "$(cat ".venv/installed-$what" 2>/dev/null)" = "$found" ]; then return; fi

    echo "Installing the packages of constraints.txt into .venv ($what), once. This downloads a few" \
        "hundred megabytes, more where torch comes with CUDA."
    if ! python -m pip install --no-input --disable-pip-version-check --progress-bar off \
        -c constraints.txt -e "$target" 2>&1 | tee "$log" | show_progress; then
        tail -n 20 "$log" >&2
        die "pip could not install the packages; everything it said is in $ROOT/$log."
    fi
    echo "$found" >.venv/installed-runtime
    echo "$found" >".venv/installed-$what"
}
