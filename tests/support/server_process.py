"""`kvrelay up` as a user runs it: real processes, real UCX, ports of its own."""

import contextlib
import http.server
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from ports import free_ports


class Server:
    """A running stack. Its processes are children of `process`."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path):
        self.process, self.port, self.log = process, port, log
        self.url = f"http://127.0.0.1:{port}"
        self.pids: set[int] = set()
        """Of the workers that a test has asked for."""

    def worker_pid(self, name: str) -> int:
        """Pid of a worker by its name, waiting for it to exist."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if any(arg.endswith(name) for arg in child.cmdline()):
                        self.pids.add(child.pid)
                        return child.pid
            time.sleep(0.05)
        raise AssertionError(f"no process of {name}; log:\n{self.log.read_text()}")

    def kill(self, name: str) -> None:
        os.kill(self.worker_pid(name), signal.SIGKILL)

    def workers(self) -> list[dict[str, object]]:
        body: list[dict[str, object]] = httpx.get(f"{self.url}/health?verbose").json()["workers"]
        return body

    def wait(self, condition, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError, KeyError, ValueError):
                if condition():
                    return
            time.sleep(0.05)
        raise AssertionError(f"not within {timeout_s} s; log:\n{self.log.read_text()}")

    def wait_ready(self) -> None:
        """Its own word for it: what the router says may be some moments old before it has seen it."""
        self.wait(lambda: "curl " in self.log.read_text(), timeout_s=200)

    def wait_for_workers(self, *names: str) -> None:
        self.wait(lambda: {w["name"] for w in self.workers()} >= set(names))

    def wait_idle(self) -> None:
        """Every block of every pool is free or cached."""
        self.wait(
            lambda: all(
                w["free_blocks"] + w["cached_blocks"] == w["total_blocks"] and not w["running"]
                for w in self.workers()
            ),
        )


@contextlib.contextmanager
def running_server(
    model: Path | None,
    *flags: str,
    environment: dict[str, str] | None = None,
) -> Iterator[Server]:
    """Start `kvrelay up`, wait until it is ready, stop it by SIGINT and check its exit code."""
    port, join_port = free_ports(2)
    command = ["up", *([str(model)] if model else []), "--threads", "1"]
    command += ["--port", str(port), "--join-port", str(join_port), *flags]
    with started(command, port, environment) as server:
        server.wait_ready()
        yield server
        if server.process.poll() is None:  # a test may have stopped it itself
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(100) == 0, server.log.read_text()


@contextlib.contextmanager
def started(
    command: list[str], port: int, environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """Start `kvrelay COMMAND`, which will serve at a port; whatever is left of it in the end is killed."""
    log = Path(tempfile.mkstemp(prefix="kvrelay-up-", suffix=".log")[1])
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvrelay.cli", *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
            start_new_session=True,
        )
    try:
        yield Server(process, port, log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        log.unlink()


class TraceSink:
    """An OTLP/HTTP collector that keeps every span it is sent."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        """(service name, span)."""
        sink = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                sink._take(ExportTraceServiceRequest.FromString(body))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}"}

    def trace(self, trace_id: str) -> list[tuple[str, Span]]:
        return [(s, span) for s, span in self.spans if span.trace_id.hex() == trace_id]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _take(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            (service,) = [
                a.value.string_value
                for a in resource.resource.attributes
                if a.key == "service.name"
            ]
            for scope in resource.scope_spans:
                self.spans += [(service, span) for span in scope.spans]
