"""A worker's weight server in a process of its own, without a model: what it serves it has kept on disk.

python -m kvrelay_bench.weights.peer_server FILE IDENTITY

Prints its address; reads one offer a line (an `OfferWeights` in hex) and says "offered".
"""

import asyncio
import sys
import tempfile
from pathlib import Path

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.weights.kept import KeptFiles
from kvrelay_transfer.transport import create_transport
from kvrelay_transfer.weights.server import WeightServer

_COPY_BYTES = 64 * 1024 * 1024


def keep(path: Path, identity: str, folder: Path) -> KeptFiles:
    """The file's bytes, as a worker with `--share-weights disk` has them."""
    kept = KeptFiles(folder, {path.name: path.stat().st_size}, identity)
    at = 0
    with path.open("rb") as file:
        while content := file.read(_COPY_BYTES):
            kept.keep(path.name, at, memoryview(content))
            at += len(content)
    return kept


async def serve(kept: KeptFiles) -> None:
    transport = create_transport("ucx://")
    await transport.start()
    server = WeightServer(transport, kept, busy=lambda: False)
    print(transport.address.hex(), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        server.offer(pb.OfferWeights.FromString(bytes.fromhex(line)))
        print("offered", flush=True)
    await server.close()
    await transport.close()


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="kvrelay-kept-") as folder:
        asyncio.run(serve(keep(Path(sys.argv[1]), sys.argv[2], Path(folder))))


if __name__ == "__main__":
    main()
