#!/bin/sh
# Runs every check in sections, goes on after a failure, and ends with a summary.
#   check.sh all     lint sections and pytest
#   check.sh lint    without pytest
set -u
cd "$(dirname "$0")/.." || exit 1
bin=.venv/bin
summary=""
failed=0

section() {
    name=$1
    shift
    printf '\n=== %s\n' "$name"
    began=$(date +%s)
    if "$@"; then verdict=ok; else verdict=FAILED; failed=1; fi
    summary="$summary$(printf '%-18s %-7s %4d s' "$name" "$verdict" "$(($(date +%s) - began))")
"
}

# Nothing to run is no failure: PYTEST_ARGS may name tests of one part.
run_pytest() {
    $bin/python -m pytest "$@"
    code=$?
    [ $code -eq 5 ] || return $code
}

# Tests start several processes on few cores, and compare results bit by bit: one thread each, on
# purpose. OpenMP threads that spin for a core another process holds are slower than no threads.
OMP_NUM_THREADS=${KVRELAY_TEST_THREADS:-1}
MKL_NUM_THREADS=$OMP_NUM_THREADS
export OMP_NUM_THREADS MKL_NUM_THREADS

section "ruff check" $bin/ruff check .
section "ruff format" $bin/ruff format --check .
section "mypy" $bin/mypy
section "import rules" $bin/lint-imports
if [ "${1:-all}" = all ]; then
    # Two processes: much of the time is spent waiting. A file stays in one of them, for what its tests
    # share; a process that dies fails the run at once.
    shared="-n ${KVRELAY_TEST_PROCESSES:-2} --dist loadfile --no-loadscope-reorder --max-worker-restart=0"
    # Both are split into words on purpose.
    # shellcheck disable=SC2086
    section "pytest" run_pytest $shared -m "not alone" ${PYTEST_ARGS:-}
    # shellcheck disable=SC2086
    section "pytest, alone" run_pytest -m alone ${PYTEST_ARGS:-}
fi

printf '\n=== summary\n%s' "$summary"
exit $failed
