"""A real S3 server in this process (moto's), and a TCP proxy that cuts connections."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "models"


class Store:
    """One server with one bucket; `environment` points every boto3 client at it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.client = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            # Nothing of who runs the tests, and no request for an instance's role.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def put_folder(self, folder: Path, prefix: str) -> str:
        """Upload its files as they are, without a manifest; returns the URL."""
        for path in sorted(folder.iterdir()):
            self.client.put_object(
                Bucket=BUCKET, Key=f"{prefix}/{path.name}", Body=path.read_bytes()
            )
        return f"s3://{BUCKET}/{prefix}"


def model_cache(folder: Path) -> str:
    """A cache folder of a test's own, but for the compiled kernels: those of everybody are used."""
    shared = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvrelay" / "kernels"
    )
    shared.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "kvrelay").mkdir(parents=True)
    (folder / "kvrelay" / "kernels").symlink_to(shared)
    return str(folder)


@contextlib.contextmanager
def running_store() -> Iterator[Store]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        store = Store(server.get_host_and_port()[1])
        store.client.create_bucket(Bucket=BUCKET)
        yield store
        store.client.close()
    finally:
        server.stop()


class CuttingProxy:
    """Forwards to a port; every connection is cut after `limit` bytes of answers, `cuts` times."""

    def __init__(self, target: int, limit: int, cuts: int) -> None:
        self._target, self._limit, self._left = target, limit, cuts
        self.cut = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._spawn(self._accept)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    def _spawn(self, work, *arguments) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            self._spawn(self._forward, client, server, None)
            self._spawn(self._forward, server, client, self._limit)

    def _forward(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(64 * 1024):
                passed += len(data)
                if limit is not None and passed > limit and self._may_cut():
                    sink.sendall(data[: len(data) - (passed - limit)])
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            if limit is not None:
                end.close()

    def _may_cut(self) -> bool:
        with self._lock:
            if self._left <= 0:
                return False
            self._left -= 1
            self.cut += 1
            return True
