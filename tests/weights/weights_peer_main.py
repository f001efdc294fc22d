"""The other process of a peer test: a worker's weight server over UCX, its weights the bytes of a file.

python weights_peer_main.py FILE IDENTITY    prints its address; reads one offer a line (hex of OfferWeights)
"""

import asyncio
import sys
from pathlib import Path

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_transfer.transport import create_transport
from kvrelay_transfer.weights.server import WeightServer


class FileWeights:
    def __init__(self, path: Path, identity: str) -> None:
        self.identity = identity
        self._name, self._content = path.name, path.read_bytes()

    def has(self, file: str, start: int, end: int) -> bool:
        return file == self._name and end <= len(self._content)

    def read(self, file: str, start: int, into: memoryview) -> None:
        into[:] = self._content[start : start + len(into)]


async def main(path: Path, identity: str) -> None:
    transport = create_transport("ucx")
    await transport.start()
    server = WeightServer(transport, FileWeights(path, identity), busy=lambda: False)
    print(transport.address.hex(), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        server.offer(pb.OfferWeights.FromString(bytes.fromhex(line)))
        print("offered", flush=True)
    await server.close()
    await transport.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
