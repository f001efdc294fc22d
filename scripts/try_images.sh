#!/bin/sh
# Builds both images, starts router and one worker, asks them something, stops them with SIGTERM.
#   try_images.sh docker [BUILD-ARGUMENT ...]     e.g. --build-arg BASE=...
# Needs a Docker engine (or a command that takes its arguments). Not part of `make infra-test`.
set -eu
cd "$(dirname "$0")/.."
engine=$1
shift
name=kvrelay-try-$$

cleanup() {
    "$engine" rm --force "$name-decode" "$name-router" >/dev/null 2>&1 || true
    "$engine" network rm "$name" >/dev/null 2>&1 || true
}
trap cleanup EXIT

"$engine" build "$@" --file infra/docker/router.Dockerfile --tag "$name-router" .
"$engine" build "$@" --build-arg VARIANT=cpu --file infra/docker/worker.Dockerfile --tag "$name-worker" .
"$engine" network create "$name" >/dev/null

run() {
    role=$1
    shift
    "$engine" run --detach --name "$name-$role" --hostname "$role" --network "$name" --network-alias "$role" \
        --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
        --env KVRELAY_JOIN_TOKEN=secret "$@" >/dev/null
}
run router --publish 127.0.0.1:18000:8000 "$name-router"
run decode "$name-worker" decode --join=router:8001 --device=cpu

tries=0
until curl --fail --silent http://127.0.0.1:18000/health >/dev/null; do
    tries=$((tries + 1))
    if [ "$tries" -gt 120 ]; then
        "$engine" logs "$name-decode"
        echo "no worker joined" >&2
        exit 1
    fi
    sleep 1
done
curl --fail --silent http://127.0.0.1:18000/v1/chat/completions -H 'content-type: application/json' \
    -d '{"model": "kvrelay-demo", "messages": [{"role": "user", "content": "What does os.path.join do?"}]}'
echo
for role in decode router; do
    "$engine" stop --time 45 "$name-$role" >/dev/null
    code=$("$engine" inspect --format '{{.State.ExitCode}}' "$name-$role")
    echo "$role ended with $code"
    test "$code" = 0
done
