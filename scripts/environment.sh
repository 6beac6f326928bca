# Sourced by train and test: finds a Python, and has bootstrap.py make .venv ready.
#
#   prepare run    .venv can run the framework on this machine's accelerator, or its CPU
#   prepare test   .venv has what the tests and the checkers need
#
# Afterwards $root is the repository and $python the interpreter of its .venv.
#   ADAPTIVE_PYTHON=/path/to/python3   make .venv with this interpreter
#   ADAPTIVE_PLATFORM=cpu|gpu|cuda12|tpu   install for this platform, whatever is found

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$root/.venv/bin/python

suits() { # the versions for which every pinned dependency has a wheel
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [ -n "${ADAPTIVE_PYTHON:-}" ]; then
        suits "$ADAPTIVE_PYTHON" && echo "$ADAPTIVE_PYTHON" && return
        echo "ADAPTIVE_PYTHON=$ADAPTIVE_PYTHON is not a Python 3.11 to 3.14." >&2
        return 2
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        suits "$candidate" && echo "$candidate" && return
    done
    echo "No Python 3.11 to 3.14 on PATH (python3 is: $(python3 --version 2>&1 || true))." >&2
    echo "Install one, or name one: ADAPTIVE_PYTHON=/path/to/python3 $0" >&2
    return 2
}

prepare() {
    local base
    base=$(find_python) || exit $?
    "$base" "$root/scripts/bootstrap.py" "$1" || exit $?
}
