"""A program between two sides of a TCP connection, which delays, throttles, holds up or resets what it passes on.

    python -m tests.campaign.relay HOST PORT        # passes connections on to HOST:PORT; prints its own port

For kernels without netem. A line on its standard input changes what it does, also to connections that are there:

    pass                    nothing
    delay SECONDS           every byte comes so much later, and up to as much again at random
    rate BYTES              at most so many bytes a second in each direction
    loss SHARE              this share of the pieces comes 0.2 to 3 s later, as TCP sends again what was dropped
    stall                   nothing comes through any more; connections stay open, as when the link is gone
    reset                   all connections are reset, now and from now on
"""

import asyncio
import random
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.helpers.commands import ROOT

PIECE = 1 << 16


class Relay:
    """The connections, and what is done to them."""

    def __init__(self, host: str, port: int) -> None:
        self.to, self.how, self.value = (host, port), "pass", 0.0
        self.writers: set[asyncio.StreamWriter] = set()
        self.passing = asyncio.Event()
        self.passing.set()

    def order(self, line: str) -> None:
        """Do from now on what a line says."""
        self.how, *value = line.split()
        self.value = float(value[0]) if value else 0.0
        if self.how == "stall":
            self.passing.clear()
        else:
            self.passing.set()
        if self.how == "reset":
            for writer in list(self.writers):
                reset(writer)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.writers.add(writer)
        try:
            await self.passing.wait()
            if self.how == "reset":
                return reset(writer)
            there, back = await asyncio.open_connection(*self.to)
            self.writers.add(back)
            await asyncio.gather(self.pump(reader, back), self.pump(there, writer))
        except OSError:
            reset(writer)
        finally:
            for end in (writer, *([back] if "back" in locals() else [])):
                self.writers.discard(end)
                end.close()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction of a connection. Pieces wait on their way, and are not held up one by another's delay."""
        underway: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(1000)

        async def deliver() -> None:
            while True:
                due, data = await underway.get()
                await asyncio.sleep(due - loop.time())
                await self.passing.wait()
                if not data:
                    return writer.write_eof()
                writer.write(data)
                await writer.drain()

        loop = asyncio.get_running_loop()
        delivering, data, due = loop.create_task(deliver()), b" ", 0.0
        try:
            while data:
                slow = self.how == "rate"
                data = await reader.read(max(1, min(PIECE, int(self.value / 20))) if slow else PIECE)
                if slow:
                    await asyncio.sleep(len(data) / self.value)
                late = self.value * random.uniform(1, 2) if self.how == "delay" else 0.0
                if self.how == "loss" and random.random() < self.value:
                    late = random.uniform(0.2, 3)
                due = max(due, loop.time() + late)  # in their order
                await underway.put((due, data))
            await delivering
        finally:
            delivering.cancel()


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection as a crashed machine's successor does (RST), without a farewell."""
    own = writer.get_extra_info("socket")
    if own is not None and own.fileno() >= 0:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def main(host: str, port: int) -> None:
    """Serve until the standard input ends."""
    relay = Relay(host, port)
    server = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while line := await orders.readline():
        relay.order(line.decode())


class Line:
    """A running relay, seen from the campaign."""

    def __init__(self, host: str, port: int) -> None:
        words = [sys.executable, "-m", "tests.campaign.relay", host, str(port)]
        self.process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())

    def does(self, order: str) -> None:
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()


@contextmanager
def line_to(port: int, host: str = "127.0.0.1") -> Iterator[Line]:
    """A relay to a port, ended with the block."""
    line = Line(host, port)
    try:
        yield line
    finally:
        line.process.kill()
        line.process.wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
