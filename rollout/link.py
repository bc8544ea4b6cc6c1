"""The meeting point of a run's trainers and samplers: a TCPStore on one interface and one port.

Orders, answers, rollouts and notices (who is lost, what failed) are signed with the run's token. A store of another run
and a value of another writer are refused. This keeps runs apart, but it is no protection against an attacker: the token
travels through torchrun's own store, which has no authentication, and the adapter's process group meets in the store
unsigned. So the network between the nodes must be trusted.
"""

import hmac
import json
import re
import secrets
import socket
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any

import psutil
import torch
import torch.distributed as dist

from data.errors import UserError
from rollout.sync import RunError

PART = 4 << 20
"""Bytes of one stored part. The store accepts at most 8 MiB per value."""
JOIN_SECONDS = 60
"""How long to wait for a store that should answer."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """The address of a run's store, and the token that proves that a process belongs to the run."""

    host: str
    port: int
    token: str = field(repr=False)


def open_store(where: str, port: int, nodes: int = 1) -> tuple[dist.TCPStore, Address]:
    """Open a run's store. It listens only on the interface or address `where`. Port 0 takes a free port.

    Raises UserError if the address does not belong to this machine, or if the port is taken; then it says whether
    another run has taken it.
    """
    host = address_of(where, nodes)
    # bind the socket here and give it to TCPStore, which would listen on all interfaces
    listener = socket.create_server((host, 0)) if port == 0 else _listen(host, port)
    token = secrets.token_hex(16)  # 128 bits, new for every run
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,  # samplers come, die and come again
        timeout=timedelta(seconds=JOIN_SECONDS),
        master_listen_fd=listener.detach(),  # the store closes it from now on
    )
    store.set("who", _sign(token, "who"))  # by this join_store() knows the run
    return store, Address(host=host, port=port, token=token)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        whose = "another program"
        try:
            if dist.TCPStore(host, port, timeout=timedelta(seconds=10), wait_for_workers=False).check(["who"]):
                whose = "another run (its token is not this run's)"
        except dist.DistError:
            pass  # the program there is no TCPStore
        raise UserError(
            f"--sync-port {port}: {whose} already answers on {host} ({error.strerror}); name another port, or 0 for "
            "a free one"
        ) from None


def join_store(address: Address, who: str) -> dist.TCPStore:
    """Connect to a run's store. who: for messages. Raises RunError if nobody answers there, or another run does."""
    where = f"{address.host}:{address.port}"
    try:
        store = dist.TCPStore(
            address.host, address.port, timeout=timedelta(seconds=JOIN_SECONDS), wait_for_workers=False
        )
        # bytes, since another program may have stored what is no text
        ours = hmac.compare_digest(store.get("who"), _sign(address.token, "who").encode())
    except dist.DistError:
        raise RunError(f"{who}: nobody answers at {where}, where the trainers' store should be") from None
    if not ours:
        raise RunError(
            f"{who}: the store at {where} belongs to another run (its token is not this run's); "
            "give each run its own --sync-port"
        )
    return store


def address_of(where: str, nodes: int = 1) -> str:
    """The IPv4 address of a network interface (eth0), a host name or an address.

    Raises UserError if it is unknown, or if it is a host name that other nodes cannot reach.
    """
    for card in psutil.net_if_addrs().get(where, []):
        if card.family == socket.AF_INET:
            return card.address
    try:
        host = socket.gethostbyname(where)
        socket.create_server((host, 0)).close()  # fails for an address of another machine
    except OSError as error:
        raise UserError(
            f"--sync-host {where}: not an interface or address of this machine ({error.strerror or error})"
        ) from None
    # many distributions map the machine's own name to 127.0.1.1 in /etc/hosts
    if host.startswith("127.") and not where[0].isdigit() and where not in ("localhost", "lo") and nodes > 1:
        raise UserError(
            f"--sync-host {where}: the name stands for {host} here, which no other node reaches; name an interface "
            "(eth0) or an address"
        )
    return host


def address_facing(address: Address) -> str:
    """The address of this machine's interface from which the trainers' store is reached."""
    # the routing table chooses the interface, as it will for gloo's connections
    with socket.create_connection((address.host, address.port), timeout=JOIN_SECONDS) as probe:
        return probe.getsockname()[0]


def put_signed(store: dist.Store, key: str, value: Any, token: str) -> None:
    """Store a JSON value under a key, in parts. The key itself is set last, to the number of parts and a signature."""
    # readers look at the key only, so a value of which some parts are missing is never seen
    data = json.dumps(value).encode()
    parts = [data[i : i + PART] for i in range(0, len(data), PART)]
    for number, part in enumerate(parts):
        store.set(f"{key}/{number}", part)
    store.set(key, f"{len(parts)} {_sign(token, key, data)}")


def take_signed(store: dist.Store, key: str, token: str) -> Any:
    """Remove the value of a key from the store and return it. None if it is not there (a stored value is never None).

    A value that is not signed with the run's token, whatever it looks like, is dropped, and a line on stderr says so.
    """
    if not store.check([key]):
        return None
    # four digits: 40 GB, more than any value. Else a foreign value could make this process ask for parts for hours
    head = re.fullmatch(rb"(\d{1,4}) ([0-9a-f]{64})", store.get(key))
    names = [f"{key}/{part}" for part in range(int(head[1]))] if head else []
    # check: a get of a part that is not there would wait for it
    whole = head is not None and (not names or store.check(names))
    data = b"".join(store.get(name) for name in names) if whole else b""
    drop(store, key)  # a key has one reader, so nobody looks for a part between its get and its end
    if not whole or not hmac.compare_digest(head[2], _sign(token, key, data).encode()):
        print(refusal(key), file=sys.stderr, flush=True)
        return None
    return json.loads(data)


def drop(store: dist.Store, key: str) -> None:
    """Remove a value of put_signed, or what there is of it."""
    store.delete_key(key)
    for part in count():
        if not store.delete_key(f"{key}/{part}"):
            return


def post_notice(store: dist.Store, key: str, text: str, token: str) -> None:
    """Store a short signed text that stays, for any number of readers. The last of several writers wins."""
    # one value and not parts: those of two writers at once could mix
    store.set(key, f"{_sign(token, key, text.encode())} {text}")


def read_notice(store: dist.Store, key: str, token: str) -> str | None:
    """The text under a key; None if there is none that is signed with the run's token. Nothing is removed."""
    if not store.check([key]):
        return None
    signature, _, text = store.get(key).partition(b" ")
    if hmac.compare_digest(signature, _sign(token, key, text).encode()):
        return text.decode()
    _say_once(refusal(key))  # it stays, since a removal could meet the true writer's text
    return None


def refusal(key: str) -> str:
    return f"refused {key}: its writer does not know this run's token"


@cache
def _say_once(text: str) -> None:
    # notices are looked for many times a second
    print(text, file=sys.stderr, flush=True)


def _sign(token: str, key: str, data: bytes = b"") -> str:
    """HMAC-SHA256 of key and data: proves that the writer knows the token without revealing the token."""
    # the zero byte: no byte can move from the end of the key to the start of the data
    return hmac.new(token.encode(), key.encode() + b"\0" + data, "sha256").hexdigest()


def all_gather_bytes(data: bytes) -> list[bytes]:
    """[bytes of rank 0, bytes of rank 1, ...] on every rank of the process group. Collective.

    torch's own collectives of objects send pickles, which can run code where they are read.
    """
    size = dist.get_world_size()
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(data)]))  # CPU tensors: gloo carries them, also beside NCCL
    longest = max(int(length) for length in lengths)
    mine = torch.zeros(max(longest, 1), dtype=torch.uint8)
    mine[: len(data)] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
    theirs = [torch.zeros_like(mine) for _ in range(size)]
    dist.all_gather(theirs, mine)
    return [part[: int(length)].numpy().tobytes() for part, length in zip(theirs, lengths, strict=True)]


def make_group(store: dist.Store, rank: int, size: int, host: str, device: torch.device) -> dist.ProcessGroup:
    """The process group of the adapter's broadcast; rank 0 is the trainer. NCCL on GPUs, else gloo on interface `host`.

    All `size` processes must call it: every pair of them is connected here. gloo waits for them up to JOIN_SECONDS.
    """
    if device.type == "cuda":
        group = dist.ProcessGroupNCCL(store, rank, size, dist.ProcessGroupNCCL.Options())
        # NCCL connects with the first broadcast and blocks meanwhile: now, before a sampler has anything to run out of memory for
        group.broadcast(torch.zeros(1, device=device), 0).wait()
        return group
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=JOIN_SECONDS)  # of joining and of each broadcast
    return dist.ProcessGroupGloo(store, rank, size, options)
