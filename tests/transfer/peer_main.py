"""The other process of a transport test: reads one JSON command a line, answers one a line.

Commands: {"do": "send" | "receive", "peer": hex, "tag": int, "nbytes": int}; "posted" is said as
soon as the operation is under way, the outcome when it has ended. Ends with its standard input.
"""

import asyncio
import json
import sys

from kvrelay_protocol.errors import TransferError
from kvrelay_transfer.transport import KVTransport, create_transport


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


async def act(transport: KVTransport, command: dict[str, object]) -> None:
    tag, nbytes = int(str(command["tag"])), int(str(command["nbytes"]))
    try:
        if command["do"] == "send":
            data = bytes([tag % 251]) * nbytes
            send = asyncio.ensure_future(
                transport.send(bytes.fromhex(str(command["peer"])), tag, data)
            )
            await asyncio.sleep(0)
            say(posted=tag)
            await send
            say(done=tag, nbytes=nbytes)
        else:
            buffer = bytearray(nbytes)
            receive = transport.receive(tag, buffer)
            say(posted=tag)
            got = await receive.wait()
            say(done=tag, nbytes=got, same=buffer[:got] == bytes([tag % 251]) * got)
    except TransferError as error:
        say(done=tag, error=type(error).__name__)


async def main(uri: str) -> None:
    transport = create_transport(uri)
    await transport.start()
    say(address=transport.address.hex())
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    pipe, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer
    )
    async with asyncio.TaskGroup() as tasks:
        while line := await reader.readline():
            tasks.create_task(act(transport, json.loads(line)))
    pipe.close()
    await transport.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
