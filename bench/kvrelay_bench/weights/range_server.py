"""As little of S3 as a loader needs, as fast as Python can send: lists and ranges of files in a folder.

python -m kvrelay_bench.weights.range_server FOLDER    prints its port; BUCKET/KEY is FOLDER/BUCKET/KEY
"""

import hashlib
import os
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


def etag(path: Path) -> str:
    found = path.stat()
    return hashlib.sha256(f"{found.st_size} {found.st_mtime_ns}".encode()).hexdigest()[:32]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root = Path()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = self.root / unquote(parts.path).strip("/")
        query = parse_qs(parts.query)
        if "list-type" in query:
            self._list(path, query["prefix"][0])
        elif path.is_file():
            self._send_range(path)
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:
        path = self.root / unquote(urlsplit(self.path).path).strip("/")
        self.send_response(200 if path.is_file() else 404)
        self.send_header("Content-Length", str(path.stat().st_size if path.is_file() else 0))
        self.end_headers()

    def _list(self, bucket: Path, prefix: str) -> None:
        items = "".join(
            f"<Contents><Key>{escape(prefix + path.name)}</Key><Size>{path.stat().st_size}</Size>"
            f'<ETag>"{etag(path)}"</ETag></Contents>'
            for path in sorted((bucket / prefix).iterdir())
        )
        body = (
            '<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated>'
            f"{items}</ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_range(self, path: Path) -> None:
        total = path.stat().st_size
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        start, end = (int(asked[1]), min(int(asked[2]) + 1, total)) if asked else (0, total)
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{etag(path)}"')
        self.send_header("Content-Length", str(end - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{total}")
        self.end_headers()
        self.wfile.flush()
        with path.open("rb") as file:
            while start < end:
                start += os.sendfile(self.connection.fileno(), file.fileno(), start, end - start)

    def log_message(self, *args: object) -> None:
        pass


def main() -> None:
    Handler.root = Path(sys.argv[1]).absolute()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
