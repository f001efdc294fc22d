"""The variable that manifests hold UCX's ports with does so in the UCX that is installed."""

import os
import subprocess
import sys

PROGRAM = """
import asyncio, os, psutil
from kvrelay_transfer.transport import create_transport

async def main():
    transport = create_transport("ucx://?tls=tcp")
    await transport.start()
    listening = [c.laddr.port for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"]
    print(*listening)
    await transport.close()

asyncio.run(main())
"""


def test_ucx_listens_inside_the_range_that_the_network_policy_opens():
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"UCX_TCP_PORT_RANGE": "20000-20999", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    ports = [int(word) for word in ran.stdout.split()]
    assert ports, ran.stderr
    assert all(20000 <= port <= 20999 for port in ports)
