"""A router for supervisor tests: `fake_router.py HTTP_PORT JOIN_PORT [DRAIN_SECONDS]`.

Workers connect and send their name; `/health` lists those whose connection is open.
"""

import contextlib
import http.server
import json
import os
import signal
import socket
import sys
import threading
import time

http_port, join_port = int(sys.argv[1]), int(sys.argv[2])
drain_s = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
print(f"pid {os.getpid()}", flush=True)
joined: set[str] = set()
stop = threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        names = sorted(joined)
        body = json.dumps({"workers": [{"name": name} for name in names]}).encode()
        self.send_response(200 if names else 503)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args):
        pass


def serve_worker(connection):
    with connection:
        name = connection.recv(100).decode()
        if not name:
            return
        joined.add(name)
        print(f"{name} joined", flush=True)
        with contextlib.suppress(OSError):
            connection.recv(1)
        joined.discard(name)


def accept(listener):
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve_worker, args=(connection,), daemon=True).start()


signal.signal(signal.SIGTERM, lambda *_: stop.set())
http.server.ThreadingHTTPServer.allow_reuse_address = True
server = http.server.ThreadingHTTPServer(("127.0.0.1", http_port), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
listener = socket.create_server(("127.0.0.1", join_port))
threading.Thread(target=accept, args=(listener,), daemon=True).start()
while not stop.wait(0.05):
    pass
print(f"draining {time.monotonic():.3f}", flush=True)
time.sleep(drain_s)
print(f"router drained {time.monotonic():.3f}", flush=True)
