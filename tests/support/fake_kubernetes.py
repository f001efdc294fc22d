"""An API server with the few REST paths that scaling needs, over real HTTP.

Deployments carry a resourceVersion that every write moves on, and a write with an old one is a 409, as
in Kubernetes. `Fault`s are used up in order by the requests they name.
"""

import contextlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

_DEPLOYMENT = re.compile(r"/apis/apps/v1/namespaces/([^/]+)/deployments/([^/]+)(/scale)?$")
_LISTS = {
    "pods": re.compile(r"/api/v1/namespaces/([^/]+)/pods$"),
    "hpas": re.compile(
        r"/apis/autoscaling/v2/namespaces/([^/]+)/horizontalpodautoscalers$"),
    "scaledobjects": re.compile(r"/apis/keda\.sh/v1alpha1/namespaces/([^/]+)/scaledobjects$"),
}  # fmt: skip


@dataclass
class Fault:
    """What becomes of the next request of `method`."""

    method: str
    status: int = 0
    """Answer with it; 0: reset the connection."""
    message: str = ""
    carried_out: bool = False
    """Reset only after the request has had its effect."""


@dataclass
class Cluster:
    """The objects of one namespace; a test edits them freely."""

    namespace: str = "llm"
    deployments: dict[str, dict[str, Any]] = field(default_factory=dict)
    pods: list[dict[str, Any]] = field(default_factory=list)
    hpas: list[dict[str, Any]] = field(default_factory=list)
    scaledobjects: list[dict[str, Any]] | None = None
    """None: KEDA is not installed."""
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    before_write: Callable[[], None] | None = None
    """What somebody else does between a client's read and its write."""
    port: int = 0

    def add(self, name: str, replicas: int = 0, ready: int = 0) -> None:
        self.deployments[name] = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name, "namespace": self.namespace, "resourceVersion": "1"},
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": {"app": name}},
                "template": {"metadata": {"labels": {"app": name}},
                             "spec": {"containers": [{"name": "worker", "image": "kvrelay"}]}},
            },
            "status": {"replicas": replicas, "readyReplicas": ready},
        }  # fmt: skip

    def replicas(self, name: str) -> int:
        return int(self.deployments[name]["spec"]["replicas"])

    def write(self, name: str, replicas: int) -> None:
        found = self.deployments[name]
        found["spec"]["replicas"] = replicas
        version = int(found["metadata"]["resourceVersion"]) + 1
        found["metadata"]["resourceVersion"] = str(version)

    def add_pod(self, app: str, status: dict[str, Any]) -> None:
        name = f"{app}-{len(self.pods)}"
        self.pods.append(
            {"metadata": {"name": name, "labels": {"app": app}}, "status": status,
             "spec": {"containers": [{"name": "worker"}]}}
        )  # fmt: skip

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        """Its URL."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        server.daemon_threads = True
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{self.port}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._serve(None)

            def do_PUT(self) -> None:
                length = int(self.headers["Content-Length"])
                self._serve(json.loads(self.rfile.read(length)))

            def _serve(self, body: dict[str, Any] | None) -> None:
                url = urlsplit(self.path)
                cluster.requests.append((self.command, url.path))
                fault = cluster.fault_for(self.command)
                if fault and fault.status:
                    self._answer(fault.status, status(fault.status, fault.message))
                    return
                if fault and not fault.carried_out:
                    self._reset()
                    return
                selector = parse_qs(url.query).get("labelSelector", [""])[0]
                answer = cluster.answer(url.path, selector, body)
                if fault:
                    self._reset()
                    return
                self._answer(*answer)

            def _answer(self, code: int, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _reset(self) -> None:
                linger = struct.pack("ii", 1, 0)  # an RST instead of a FIN
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

        return Handler

    def fault_for(self, method: str) -> Fault | None:
        for fault in self.faults:
            if fault.method == method:
                self.faults.remove(fault)
                return fault
        return None

    def answer(
        self, path: str, selector: str, body: dict[str, Any] | None
    ) -> tuple[int, dict[str, Any]]:
        for kind, pattern in _LISTS.items():
            if pattern.match(path):
                return self._list(kind, selector)
        match = _DEPLOYMENT.match(path)
        if not match or match[1] != self.namespace or match[2] not in self.deployments:
            return 404, status(404, f"{path} not found")
        name = match[2]
        if body is not None:
            if self.before_write:
                self.before_write()
            version = self.deployments[name]["metadata"]["resourceVersion"]
            if body["metadata"].get("resourceVersion", version) != version:
                return 409, status(409, "the object has been modified; please apply your changes")
            self.write(name, body["spec"]["replicas"])
        return 200, self._scale_of(name) if match[3] else self.deployments[name]

    def _list(self, kind: str, selector: str) -> tuple[int, dict[str, Any]]:
        items: list[dict[str, Any]] | None = getattr(self, kind)
        if items is None:
            return 404, {"message": "404 page not found"}
        wanted = dict(pair.split("=") for pair in selector.split(",") if pair)
        shown = [
            item for item in items
            if wanted.items() <= item["metadata"].get("labels", {}).items()
        ]  # fmt: skip
        return 200, {"items": shown, "metadata": {}}

    def _scale_of(self, name: str) -> dict[str, Any]:
        found = self.deployments[name]
        return {
            "apiVersion": "autoscaling/v1",
            "kind": "Scale",
            "metadata": found["metadata"],
            "spec": {"replicas": found["spec"]["replicas"]},
            "status": {"replicas": found["status"]["replicas"]},
        }


def status(code: int, message: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Status", "code": code, "message": message}
