"""A worker for supervisor tests: `fake_worker.py NAME JOIN_PORT [stubborn|helper|segment]`."""

import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import preloaded

name, join_port = sys.argv[1], int(sys.argv[2])
mode = sys.argv[3] if len(sys.argv) > 3 else ""


def on_sigterm(*_args):
    if mode == "stubborn":
        print("not now", flush=True)
        return
    print(f"terminated {time.monotonic():.3f}", flush=True)
    os._exit(0)


signal.signal(signal.SIGTERM, on_sigterm)
if mode == "helper":
    # Something a worker starts, such as a compiler: in the worker's process group, outlives it.
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(f"helper {helper.pid}", flush=True)
if mode == "segment":
    # Deaf as well, so that it can't clean up.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    segment = Path(f"/dev/shm/kvrelay-test-{os.getpid()}")
    segment.write_bytes(bytes(4096))
    with segment.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    print(f"segment {segment}", flush=True)
print(f"loaded by {preloaded.PID}", flush=True)
print(f"parent {os.getppid()}", flush=True)
print(f"pid {os.getpid()} group {os.getpgid(0)} session {os.getsid(0)}", flush=True)
while True:
    try:
        connection = socket.create_connection(("127.0.0.1", join_port))
        break
    except ConnectionRefusedError:
        time.sleep(0.02)
connection.sendall(name.encode())
while True:
    time.sleep(0.1)
