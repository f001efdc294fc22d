#!/bin/sh
# Makes the virtual environment and puts torch into it. Called by the Makefile.
#   setup.sh venv    needs PYTHON, TORCH_RANGE
#   setup.sh torch   needs TORCH_RANGE; TORCH_SPEC and TORCH_INDEX_URL may be empty
set -eu
cd "$(dirname "$0")/.."

have_gpu() { nvidia-smi -L >/dev/null 2>&1; }

# A torch within the supported range, importable by interpreter $1.
has_torch() {
    "$1" - <<'PY' >/dev/null 2>&1
import sys
import torch
version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
sys.exit(not (2, 11) <= version < (2, 14))
PY
}

make_venv() {
    if [ -z "${PYTHON:-}" ]; then
        echo "kvrelay needs Python 3.11 or newer and found none: make ... PYTHON=/path/to/python3.11" >&2
        exit 1
    fi
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "PYTHON=$PYTHON does not run or is older than 3.11" >&2
        exit 1
    fi
    if [ -x .venv/bin/python ]; then
        return
    fi
    # A GPU host comes with the torch that fits its driver: build on that one.
    if have_gpu && has_torch "$PYTHON"; then
        echo "venv: $PYTHON, with the torch it already has"
        "$PYTHON" -m venv --system-site-packages .venv
    else
        echo "venv: $PYTHON ($("$PYTHON" -V))"
        "$PYTHON" -m venv .venv
    fi
}

install_torch() {
    if [ -z "${TORCH_SPEC:-}" ]; then
        if have_gpu; then
            if has_torch .venv/bin/python; then
                echo "torch: present"
                return
            fi
            TORCH_SPEC=$TORCH_RANGE
        else
            TORCH_SPEC=torch==2.13.0
        fi
    fi
    echo "torch: $TORCH_SPEC"
    # Alone and first: a resolver that sees the rest as well may prefer a CUDA build.
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        .venv/bin/python -m pip install --quiet --index-url "$TORCH_INDEX_URL" "$TORCH_SPEC"
    else
        .venv/bin/python -m pip install --quiet "$TORCH_SPEC"
    fi
}

case "${1:-}" in
    venv) make_venv ;;
    torch) install_torch ;;
    *) echo "usage: setup.sh venv|torch" >&2; exit 2 ;;
esac
