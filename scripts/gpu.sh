#!/bin/sh
# Correctness and speed on an NVIDIA GPU: `make gpu`.
#
#   1. the tests of kernels and engine, on the GPU where they can use it
#   2. kvrelay bench gpu, which writes docs/results/gpu-<name>.json
#
# Runs from a plain copy of the tree and needs no network: the packages are found through PYTHONPATH,
# with whichever interpreter has a torch that sees the GPU (.venv, then PYTHON, then python3). Packages
# that it lacks may lie as wheels in .whl/.
#
#   PYTHON           interpreter to use if .venv has no such torch
#   GPU_TEST_S       seconds after which the tests are stopped; default 270
#   GPU_BENCH_S      seconds after which no further measurement starts; default 200
#   GPU_TESTS        what to test; default tests/kernels tests/engine
#   GPU_OUT          where the results go as well: a folder
set -u
cd "$(dirname "$0")/.." || exit 1
tree=$(pwd)

if ! nvidia-smi -L >/dev/null 2>&1; then
    echo "make gpu needs an NVIDIA GPU, and nvidia-smi finds none on this machine" >&2
    exit 1
fi

for folder in sdk protocol router engine kernels transfer prefill_worker decode_worker infra bench; do
    PYTHONPATH="$tree/$folder${PYTHONPATH:+:$PYTHONPATH}"
done
export PYTHONPATH

python=""
for candidate in .venv/bin/python "${PYTHON:-python3}" python3; do
    if "$candidate" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' \
        >/dev/null 2>&1; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "make gpu needs a Python whose torch sees the GPU: make gpu PYTHON=/path/to/python3" >&2
    exit 1
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

if ls .whl/*.whl >/dev/null 2>&1; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
        --target "$scratch/site" .whl/*.whl || exit 1
    PYTHONPATH="$PYTHONPATH:$scratch/site"
fi

has() { "$python" -c "import $1" >/dev/null 2>&1; }

missing=""
for package in safetensors numpy transformers pytest xxhash google.protobuf; do
    has "$package" || missing="$missing $package"
done
if [ -n "$missing" ]; then
    echo "make gpu: $python lacks$missing; install them, or put their wheels into .whl/" >&2
    exit 1
fi

# The settings of pyproject.toml without plugins that may be missing; a warning of this machine's torch
# or driver is no failure of ours.
settings=$scratch/pytest.ini
printf '[pytest]\naddopts = --import-mode=importlib -ra\npythonpath = %s/tests/support\n' "$tree" >"$settings"
left_out=""
if has pytest_asyncio; then
    printf 'asyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n' >>"$settings"
else
    left_out="--ignore=tests/engine/runtime"
    echo "left out: tests/engine/runtime, which needs pytest-asyncio"
fi
has pytest_timeout && printf 'timeout = 240\n' >>"$settings"

echo "=== tests: $($python -c 'import torch, triton, sys
print(torch.cuda.get_device_name(0), "python", sys.version.split()[0], "torch", torch.__version__,
      "triton", triton.__version__)')"
# Words are split on purpose.
# shellcheck disable=SC2086
timeout -k 10 "${GPU_TEST_S:-270}" "$python" -m pytest -q -c "$settings" --rootdir "$tree" \
    -p no:cacheprovider $left_out ${GPU_TESTS:-tests/kernels tests/engine}
tests=$?
case $tests in
    0) verdict=ok ;;
    124 | 137) verdict="stopped after ${GPU_TEST_S:-270} s" ;;
    *) verdict=FAILED ;;
esac

echo "=== tests: $verdict"
"$python" -m kvrelay.cli bench gpu --device cuda --budget "${GPU_BENCH_S:-200}"
bench=$?
if [ -n "${GPU_OUT:-}" ]; then
    cp docs/results/gpu-*.json "$GPU_OUT"/ 2>/dev/null
fi
[ $tests -eq 0 ] && [ $bench -eq 0 ]
