"""Flags that several commands take.

Defaults repeat those of `RouterConfig` and `WorkerConfig`; a test holds them equal.
"""

from dataclasses import replace

from kvrelay.cli.flags import (
    Bounds,
    Flag,
    addresses,
    api_key,
    boolean,
    bounds,
    choice,
    device,
    duration,
    existing_file,
    integer,
    names,
    number,
    size,
    text,
)

MiB = 1024 * 1024

MODEL = (
    Flag("model", "model folder, hub id or s3://bucket/prefix; none for the demo model", text,
         metavar="MODEL"),
    Flag("--revision", "branch, tag or commit of a hub id; what a start from S3 calls its model", text,
         group="model", metavar="REV"),
    Flag(
        "--served-model-name",
        "the name clients use",
        text,
        group="model",
        metavar="NAME",
    ),
)  # fmt: skip

WEIGHTS = (
    Flag("--link-gbps", "the narrowest link to the weights in Gbit/s; 0: as measured",
         number(0, 100_000), 0.0, "weights", "GBIT/S"),
    Flag("--fetch-streams", "requests to S3 at once", integer(1, 256), 32, "weights", "N"),
    Flag("--fetch-part", "the largest request to S3", size(), 16 * MiB, "weights", "SIZE"),
    Flag("--fetch-window", "weights from S3 that may wait in memory to be packed", size(),
         1024 * MiB, "weights", "SIZE"),
    Flag("--weights-from", "of a model in S3: store; a worker that has them (peer); auto drops a slow one",
         choice("auto", "peer", "store"), "auto", "weights", "WHERE"),
    Flag("--share-weights", "with workers that start later: auto if not rounded, disk keeps them, or off",
         choice("auto", "disk", "off"), "auto", "weights", "HOW"),
)  # fmt: skip

HTTP = (
    Flag("--host", "address to serve HTTP on", text, "127.0.0.1", "http", "HOST"),
    Flag("--port", "port to serve HTTP on; 0 picks one", integer(0, 65535), 8000, "http", "PORT"),
    Flag(
        "--api-key",
        "accept this key; repeatable, none: no authentication",
        api_key,
        (),
        "http",
        "KEY",
        repeated=True,
        secret=True,
    ),
    Flag("--tls-cert", "certificate chain (PEM)", existing_file, None, "http", "FILE"),
    Flag("--tls-key", "private key (PEM)", existing_file, None, "http", "FILE"),
    Flag("--max-body", "largest request body", size(1024), 8 * MiB, "http", "SIZE"),
)

_JOIN_TOKEN = Flag(
    "--join-token", "secret that workers present", text, "", "join", "TOKEN", secret=True
)
JOIN_SERVER = (
    Flag("--join-host", "address that workers dial", text, "127.0.0.1", "join", "HOST"),
    Flag("--join-port", "port that workers dial; 0 picks one", integer(0, 65535), 8001, "join",
         "PORT"),
    _JOIN_TOKEN,
)  # fmt: skip
JOIN_SERVER_TLS = (
    Flag("--join-tls-cert", "certificate chain that workers are shown (PEM)", existing_file, None,
         "join", "FILE"),
    Flag("--join-tls-key", "its private key (PEM)", existing_file, None, "join", "FILE"),
    Flag("--join-tls-ca", "ask workers for a certificate of this authority (PEM)", existing_file,
         None, "join", "FILE"),
)  # fmt: skip
JOIN_CLIENT = (
    Flag("--join", "join address of the router, or of all of them: HOST:PORT,HOST:PORT", addresses,
         None, "join", "HOST:PORT", required=True),
    _JOIN_TOKEN,
    Flag("--name", "unique among the router's workers", text, None, "join", "NAME"),
    Flag("--router-ca", "dial with TLS: authority of the routers' certificates (PEM)",
         existing_file, None, "join", "FILE"),
    Flag("--router-cert", "this worker's certificate chain, if routers ask (PEM)", existing_file,
         None, "join", "FILE"),
    Flag("--router-key", "its private key (PEM)", existing_file, None, "join", "FILE"),
    Flag("--router-name", "name in the routers' certificates, if not the host dialled", text, None,
         "join", "NAME"),
)  # fmt: skip

REQUESTS = (
    Flag("--max-queue", "requests that may wait for a place", integer(1), 512, "requests", "N"),
    Flag("--queue-timeout", "longest wait for a place", duration(), 30.0, "requests", "SECONDS"),
    Flag("--request-timeout", "deadline of a request that names none", duration(0.1), 600.0,
         "requests", "SECONDS"),
    Flag("--replay-wait", "after a worker died: longest wait for another", duration(), 2.0,
         "requests", "SECONDS"),
    Flag("--max-replays", "workers one request may lose", integer(0), 3, "requests", "N"),
    Flag("--local-prefill-max-tokens", "prompts up to this are prefilled where they decode",
         integer(0), 0, "requests", "N"),
    Flag("--log-requests", "print a line for every HTTP request", boolean, False, "requests", switch=True),
)  # fmt: skip

TIMES = (
    Flag("--lease", "a KV lease ends after this", duration(0.1), 10.0, "times", "SECONDS"),
    Flag("--heartbeat", "pause between load reports", duration(0.01), 0.25, "times", "SECONDS"),
    Flag("--drain-grace", "how long open requests may take at shutdown", duration(), 30.0, "times",
         "SECONDS"),
)  # fmt: skip

ENGINE = (
    Flag("--device", "cpu, cuda, cuda:N or auto", device, "auto", "engine", "DEVICE"),
    Flag("--dtype", "auto, float32, bfloat16 or float16",
         choice("auto", "float32", "bfloat16", "float16"), "auto", "engine", "DTYPE"),
    Flag("--quantization", "none or int8: store the projections' weights in 8 bits",
         choice("none", "int8"), "none", "engine", "METHOD"),
    Flag("--kv-memory", "KV pool of each worker", size(), 256 * MiB, "engine", "SIZE"),
    Flag("--block-size", "tokens in a KV block", integer(1, 1024), 16, "engine", "TOKENS"),
    Flag("--max-model-len", "tokens of prompt plus answer; 0: what model and pool hold",
         integer(0), 0, "engine", "TOKENS"),
    Flag("--max-batch-tokens", "prompt tokens computed in one step", integer(1), 512, "engine",
         "TOKENS"),
    Flag("--max-sequences", "sequences in one step", integer(1), 256, "engine", "N"),
    Flag("--threads", "CPU threads of each worker; 0 shares the cores", integer(0), 0, "engine",
         "N"),
)  # fmt: skip

TRANSFER = (
    Flag("--transport", "how KV blocks travel", choice("ucx"), "ucx", "transfer", "NAME"),
    Flag("--require-transport", "do not start unless UCX chose one of these: cuda_ipc, rc, tcp",
         names, None, "transfer", "NAME[,NAME]"),
    Flag("--staging", "one staging buffer, the largest message", size(64 * 1024), 4 * MiB,
         "transfer", "SIZE"),
    Flag("--staging-buffers", "staging buffers per worker", integer(2), 32, "transfer", "N"),
)  # fmt: skip

_ALONE = replace(
    TRANSFER[0],
    parse=choice("ucx", "inproc"),
    help="how KV blocks travel: ucx, or inproc for a worker that is the only one",
)

POOLS = (
    Flag("--prefill", "prefill workers", integer(0, 64), 1, "pools", "N"),
    Flag("--decode", "decode workers", integer(1, 64), 1, "pools", "N"),
)

_IDLE = Flag("--idle", "without work for so long a pool goes down to its least", duration(0.1),
             300.0, "pools", "SECONDS")  # fmt: skip
_SLEEP = Flag("--sleep", "a pool at zero keeps its processes for so long, asleep: weights in host memory, device "
              "freed; 0: not at all", duration(), 0.0, "pools", "SECONDS")  # fmt: skip
ON_DEMAND = (
    Flag("--min", "workers of each pool that always run; the others start when they are needed. "
         "None: all always run", integer(0, 64), None, "pools", "N"),
    _IDLE,
    _SLEEP,
)  # fmt: skip
WAKING = (
    Flag("--wake-timeout", "longest wait for a pool that was at zero", duration(), 300.0,
         "requests", "SECONDS"),
)  # fmt: skip
SCALING = (
    Flag("--provider", "who starts and stops workers: kubernetes:NAMESPACE/PREFILL,DECODE "
         "(Deployments), aws:CLUSTER/PREFILL,DECODE (ECS services), local:SOCKET", text, None,
         "scaling", "KIND:WHERE"),
    Flag("--scaler-port", "KEDA starts and stops workers, and asks here how many",
         integer(0, 65535), None, "scaling", "PORT"),
    Flag("--scale-prefill", "prefill workers, at least and at most", bounds, Bounds(1, 1), "scaling",
         "MIN:MAX"),
    Flag("--scale-decode", "decode workers, at least and at most", bounds, Bounds(1, 1), "scaling",
         "MIN:MAX"),
    _IDLE,
    _SLEEP,
)  # fmt: skip

SUPERVISED = Flag(
    "--supervised", "print no address: another process does", boolean, False, "http", switch=True
)

HOSTED = Flag("--ping-while-starting", "serve /ping and /invocations; /ping is this until the model "
              "can answer: 503, or 204 for RunPod", integer(200, 599), None, "http", "STATUS")  # fmt: skip

ROUTER_FLAGS = (
    *MODEL,
    *HTTP,
    SUPERVISED,
    HOSTED,
    *JOIN_SERVER,
    *JOIN_SERVER_TLS,
    *REQUESTS,
    *WAKING,
    *SCALING,
    *TIMES,
)
WORKER_FLAGS = (*MODEL, *WEIGHTS, *JOIN_CLIENT, *ENGINE, _ALONE, *TRANSFER[1:], *TIMES)
STACK_FLAGS = (
    *MODEL, *WEIGHTS, *POOLS, *ON_DEMAND, *HTTP, *JOIN_SERVER, *ENGINE, *REQUESTS, *WAKING, *TRANSFER,
    *TIMES,
)  # fmt: skip
