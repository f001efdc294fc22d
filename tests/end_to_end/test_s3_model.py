"""`kvrelay up s3://...` answers as the local model does, and says what its weights cost."""

import contextlib
import logging
import re
import subprocess
import sys
from collections.abc import Iterator

import httpx
from s3_store import model_cache, running_store
from server_process import TraceSink, running_server

from kvrelay import LLM, SamplingParams
from kvrelay.cli.main import main
from kvrelay_protocol.model_files import DEMO_MODEL_DIR

BODY = {
    "messages": [{"role": "user", "content": "What does os.path.join do?"}],
    "max_tokens": 24,
    "temperature": 0,
}
FLAGS = ("--served-model-name", "m", "--kv-memory", "16MiB")


class WeightRequests(logging.Handler):
    """Counts what the store answers with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        self.count += "GET " in line and "/model.safetensors" in line


@contextlib.contextmanager
def counted_requests() -> Iterator[WeightRequests]:
    counter, log = WeightRequests(), logging.getLogger("werkzeug")
    log.addHandler(counter)
    yield counter
    log.removeHandler(counter)


def ask(url: str) -> str:
    answer = httpx.post(f"{url}/v1/chat/completions", json=BODY | {"model": "m"}, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def test_a_model_from_s3_answers_like_the_local_one(tmp_path, monkeypatch):
    sink = TraceSink()
    with running_store() as store:
        environment = store.environment | sink.environment
        environment |= {"XDG_CACHE_HOME": model_cache(tmp_path / "cache")}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert main(["weights", "push", str(DEMO_MODEL_DIR), "s3://models/demo"]) == 0
        # Nothing is rounded, on whatever CPU; and a peer may be as slow as this machine is.
        flags = (*FLAGS, "--link-gbps", "10", "--dtype", "float32", "--weights-from", "peer")
        with (
            counted_requests() as requests,
            running_server("s3://models/demo", *flags, environment=environment) as server,
        ):
            found = ask(server.url)
            log, fetched = server.log.read_text(), requests.count
            # A decode worker that starts again finds a prefill worker with the same weights.
            server.kill("decode-0")
            server.wait(lambda: "from peer " in server.log.read_text())
            server.wait_for_workers("decode-0", "prefill-0")
            again = ask(server.url)
            restart = server.log.read_text()[len(log) :]
    for name in environment:
        monkeypatch.delenv(name)
    lines = re.findall(r"weights +7\.\d\d MB in .* of the narrowest link .*s3://models/demo", log)
    assert len(lines) == 2, log
    assert "not verified" not in log
    assert re.search(r"s3://models/demo at revision [0-9a-f]{16}\n", log)
    peers = r"from peer prefill-0 over tcp/\S+ \(found in \S+ s\), not s3://models/demo\n"
    assert re.search(peers, restart), restart
    assert requests.count == fetched > 0
    loads = [span for _, span in sink.spans if span.name == "load weights"]
    sink.close()
    assert len(loads) in {2, 3}  # the worker that was killed may have taken its own along
    for span in loads:
        attributes = {pair.key: pair.value for pair in span.attributes}
        assert attributes["kvrelay.weights.verified"].bool_value
        assert attributes["kvrelay.weights.link_share"].double_value > 0
        assert span.parent_span_id
    with LLM(DEMO_MODEL_DIR, dtype="float32") as local:
        params = SamplingParams(temperature=0, max_tokens=BODY["max_tokens"])
        (expected,) = local.chat(BODY["messages"], params, use_tqdm=False)
    assert found == again == expected.outputs[0].text
    assert found


def test_a_wrong_checksum_stops_a_worker_with_one_line(tmp_path, monkeypatch):
    with running_store() as store:
        environment = store.environment | {"XDG_CACHE_HOME": model_cache(tmp_path / "cache")}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert main(["weights", "push", str(DEMO_MODEL_DIR), "s3://models/bad"]) == 0
        body = bytearray((DEMO_MODEL_DIR / "model.safetensors").read_bytes())
        body[-1] ^= 1
        store.client.put_object(Bucket="models", Key="bad/model.safetensors", Body=bytes(body))
        done = subprocess.run(
            [sys.executable, "-m", "kvrelay.cli", "decode", "s3://models/bad",
             "--join", "127.0.0.1:9", "--device", "cpu", "--threads", "1"],
            check=False, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
    assert done.returncode == 3
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("kvrelay: wrong checksum: ")
    assert "s3://models/bad/model.safetensors" in done.stderr
