#!/bin/sh
# Builds the images, starts router and one worker, and both in one container; asks them something, stops
# them with SIGTERM.
#   try_images.sh docker [BUILD-ARGUMENT ...]     e.g. --build-arg BASE=...
# Needs a Docker engine (or a command that takes its arguments). Not part of `make infra-test`.
set -eu
cd "$(dirname "$0")/.."
engine=$1
shift
name=kvrelay-try-$$

cleanup() {
    "$engine" rm --force "$name-decode" "$name-router" "$name-one" >/dev/null 2>&1 || true
    "$engine" network rm "$name" >/dev/null 2>&1 || true
}
trap cleanup EXIT

"$engine" build "$@" --file infra/docker/router.Dockerfile --tag "$name-router" .
"$engine" build "$@" --build-arg VARIANT=cpu --file infra/docker/worker.Dockerfile --tag "$name-worker" .
"$engine" build "$@" --build-arg VARIANT=cpu --file infra/docker/worker.Dockerfile --target one-container \
    --tag "$name-one" .
"$engine" network create "$name" >/dev/null

run() {
    role=$1
    shift
    "$engine" run --detach --name "$name-$role" --hostname "$role" --network "$name" --network-alias "$role" \
        --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges "$@" >/dev/null
}
# answers PORT PATH ROLE: ask until it does, then for a chat.
answers() {
    tries=0
    until curl --fail --silent "http://127.0.0.1:$1$2" >/dev/null; do
        tries=$((tries + 1))
        if [ "$tries" -gt 120 ]; then
            "$engine" logs "$name-$3"
            echo "$3 is not ready" >&2
            exit 1
        fi
        sleep 1
    done
    curl --fail --silent "http://127.0.0.1:$1/v1/chat/completions" -H 'content-type: application/json' \
        -d '{"model": "kvrelay-demo", "messages": [{"role": "user", "content": "What does os.path.join do?"}]}'
    echo
}
stop() {
    "$engine" stop --time "$2" "$name-$1" >/dev/null
    code=$("$engine" inspect --format '{{.State.ExitCode}}' "$name-$1")
    echo "$1 ended with $code"
    test "$code" = 0
}

run router --env KVRELAY_JOIN_TOKEN=secret --publish 127.0.0.1:18000:8000 "$name-router"
run decode --env KVRELAY_JOIN_TOKEN=secret "$name-worker" decode --join=router:8001 --device=cpu
answers 18000 /health decode
stop decode 45
stop router 45

run one --env KVRELAY_MODEL=kvrelay-demo --publish 127.0.0.1:18080:8080 "$name-one" serve
answers 18080 /ping one
stop one 10
