"""A chart rendered by Helm itself, without a cluster.

Helm's Go library, as PyPI's `helm-sdkpy` ships it (the package wants Python 3.12, its shared library does
not care), installs into a server that knows the resource types and writes down what is created. What is
returned is what a cluster would have been sent: defaults merged, `values.schema.json` enforced,
`Capabilities` of the API server below.
"""

import ctypes
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "infra" / "helm" / "kvrelay"
EXAMPLES = ROOT / "infra" / "helm" / "examples"
TOOLS = ROOT / "build" / "infra-tools"
LIBRARY = TOOLS / "helm" / "helm_sdkpy" / "_lib" / "linux-amd64" / "libhelm_sdkpy.so"

Manifest = dict[str, Any]

COMMIT = "c" * 40
"""Stands for one of the hub that a user has to name."""

_KINDS = {
    "v1": {"Secret": "secrets", "Service": "services", "ServiceAccount": "serviceaccounts",
           "ConfigMap": "configmaps", "PersistentVolumeClaim": "persistentvolumeclaims"},
    "apps/v1": {"Deployment": "deployments", "StatefulSet": "statefulsets"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "networking.k8s.io/v1": {"NetworkPolicy": "networkpolicies", "Ingress": "ingresses"},
    "keda.sh/v1alpha1": {"ScaledObject": "scaledobjects",
                         "TriggerAuthentication": "triggerauthentications"},
    "monitoring.coreos.com/v1": {"ServiceMonitor": "servicemonitors",
                                 "PrometheusRule": "prometheusrules"},
}  # fmt: skip

_RECORD: Manifest = {"kind": "Secret", "metadata": {"name": "release"}}


def example_values() -> dict[str, Manifest]:
    """The values files that we ship, by name, with what each leaves to the user filled in."""
    found = {
        path.stem: yaml.safe_load(path.read_text()) for path in sorted(EXAMPLES.glob("*.yaml"))
    }
    found["eks-efa"]["model"]["revision"] = COMMIT
    return found


class HelmError(Exception):
    """Helm refused: the chart, the values, or what came out."""


def _discovery(path: str) -> Manifest | None:
    """The API server's answer to "what do you have?"; None for any other question."""
    groups = [name for name in _KINDS if "/" in name]
    if path == "/version":
        return {"major": "1", "minor": "32", "gitVersion": "v1.32.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        versions = [{"groupVersion": each, "version": each.split("/")[1]} for each in groups]
        return {
            "kind": "APIGroupList",
            "groups": [
                {"name": v["groupVersion"].split("/")[0], "versions": [v], "preferredVersion": v}
                for v in versions
            ],
        }
    version = path.removeprefix("/apis/").removeprefix("/api/")
    if version not in _KINDS:
        return None
    resources = [
        {"name": plural, "kind": kind, "namespaced": True, "verbs": ["create", "get", "patch"]}
        for kind, plural in _KINDS[version].items()
    ]
    return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}


class _ApiServer(ThreadingHTTPServer):
    """Says yes to every object and keeps it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.created: list[Manifest] = []


class _Handler(BaseHTTPRequestHandler):
    server: _ApiServer

    def do_GET(self) -> None:
        known = _discovery(self.path.partition("?")[0])
        absent = {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}
        self._answer(200 if known else 404, known or absent)

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        if "json" not in self.headers["content-type"]:
            # Helm's record of the release, in protobuf; the chart's objects come as JSON.
            self._answer(201, _RECORD)
            return
        manifest = json.loads(raw)
        self.server.created.append(manifest)
        self._answer(201, manifest)

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._answer(200, _RECORD)

    def _answer(self, status: int, body: Manifest) -> None:
        raw = json.dumps({"apiVersion": "v1", **body}).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        """Nothing: a test's output is not an access log."""


class Helm:
    """The library, loaded once per process: it holds 100 MB."""

    def __init__(self, folder: Path) -> None:
        """Args: `folder` is empty and ours; Helm keeps a kubeconfig and caches there."""
        os.environ["HELM_CACHE_HOME"] = os.environ["HELM_CONFIG_HOME"] = str(folder / "helm")
        self._folder = folder
        self._lib = ctypes.CDLL(str(LIBRARY))
        self._lib.helm_sdkpy_last_error.restype = ctypes.c_char_p

    def render(self, values: Manifest, *, release: str = "kvrelay", namespace: str = "serving"):
        """The objects that `helm install RELEASE CHART --values VALUES` creates, in Helm's order.

        Raises:
            HelmError: with Helm's own message.
        """
        return self._install(values, release, namespace)[0]

    def notes(self, values: Manifest) -> str:
        """What Helm prints after the installation."""
        return self._install(values, "kvrelay", "serving")[1]

    def lint(self) -> str:
        """Findings of `helm lint`, as JSON text.

        Raises:
            HelmError: one is an error.
        """
        out = ctypes.c_void_p()
        handle = self._configure("http://127.0.0.1:9", "default")
        self._check(self._lib.helm_sdkpy_lint(handle, str(CHART).encode(), ctypes.byref(out)))
        return self._text(out)

    def _install(
        self, values: Manifest, release: str, namespace: str
    ) -> tuple[list[Manifest], str]:
        server = _ApiServer()
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            handle = self._configure(f"http://127.0.0.1:{server.server_port}", namespace)
            options = {"wait": False, "server_side_apply": "false", "disable_openapi_validation": True,
                       "timeout_seconds": 30}  # fmt: skip
            out = ctypes.c_void_p()
            code = self._lib.helm_sdkpy_install(
                handle, release.encode(), str(CHART).encode(), json.dumps(values).encode(), b"",
                json.dumps(options).encode(), ctypes.byref(out),
            )  # fmt: skip
            self._check(code)
            result = json.loads(self._text(out))
            return server.created, str(result["info"]["notes"])
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def _configure(self, url: str, namespace: str) -> ctypes.c_ulonglong:
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": url}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
            "users": [{"name": "me", "user": {}}],
        }  # fmt: skip
        kubeconfig = self._folder / f"kubeconfig-{url.rpartition(':')[2]}"
        kubeconfig.write_text(json.dumps(config))
        handle = ctypes.c_ulonglong()
        self._check(
            self._lib.helm_sdkpy_config_create(
                namespace.encode(), str(kubeconfig).encode(), None, b"{}", ctypes.byref(handle)
            )
        )
        return handle

    def _check(self, code: int) -> None:
        if code:
            raise HelmError((self._lib.helm_sdkpy_last_error() or b"unknown").decode())

    def _text(self, out: ctypes.c_void_p) -> str:
        text = ctypes.string_at(out).decode()
        self._lib.helm_sdkpy_free(out)
        return text
