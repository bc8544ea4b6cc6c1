"""Where a run's trainers and samplers meet: a TCPStore on one interface and one port.

Orders, answers and rollouts are signed with the run's token; a store of another run, and a value of another writer, are
refused. It keeps runs apart. It is no wall: the token comes through torchrun's own store, which asks nobody who he is, so the
network between the nodes must be trusted.
"""

import hmac
import json
import secrets
import socket
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from data.errors import UserError
from rollout.sync import RunError

PART = 4 << 20
"""Bytes of a value; the store takes 8 MiB at most."""
JOIN_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a run's samplers and trainers meet."""

    host: str
    port: int
    token: str = field(repr=False)


def serve(where: str, port: int, nodes: int = 1) -> tuple[dist.TCPStore, Address]:
    """Open a run's store on the interface or address `where` alone; port 0 takes a free one.

    Raises UserError when the address is not this machine's or the port is taken, and says whether by another run.
    """
    host = address_of(where, nodes)
    listener = socket.create_server((host, 0)) if port == 0 else _listen(host, port)
    token = secrets.token_hex(16)
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=JOIN_SECONDS),
        master_listen_fd=listener.detach(),
    )
    store.set("who", _sign(token, "who"))
    return store, Address(host=host, port=port, token=token)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        whose = "another program"
        try:
            if dist.TCPStore(host, port, timeout=timedelta(seconds=3), wait_for_workers=False).check(["who"]):
                whose = "another run (its token is not this run's)"
        except dist.DistError:
            pass  # no store
        raise UserError(
            f"--sync-port {port}: {whose} already answers on {host} ({error.strerror}); name another port, or 0 for "
            "a free one"
        ) from None


def join(address: Address, who: str) -> dist.TCPStore:
    """Join a run's store. Raises RunError when nobody answers there, or another run does."""
    where = f"{address.host}:{address.port}"
    try:
        store = dist.TCPStore(
            address.host, address.port, timeout=timedelta(seconds=JOIN_SECONDS), wait_for_workers=False
        )
        ours = hmac.compare_digest(store.get("who").decode(), _sign(address.token, "who"))
    except dist.DistError:
        raise RunError(f"{who}: nobody answers at {where}, where the trainers' store should be") from None
    if not ours:
        raise RunError(
            f"{who}: the store at {where} belongs to another run (its token is not this run's); give each run its own --sync-port"
        )
    return store


def address_of(where: str, nodes: int = 1) -> str:
    """The IPv4 address of a network interface (eth0), a host name or an address.

    Raises UserError for an unknown one, and for a name that other nodes cannot use.
    """
    for card in psutil.net_if_addrs().get(where, []):
        if card.family == socket.AF_INET:
            return card.address
    try:
        host = socket.gethostbyname(where)
        socket.create_server((host, 0)).close()
    except OSError as error:
        raise UserError(
            f"--sync-host {where}: not an interface or address of this machine ({error.strerror or error})"
        ) from None
    if host.startswith("127.") and not where[0].isdigit() and where not in ("localhost", "lo") and nodes > 1:
        raise UserError(
            f"--sync-host {where}: the name stands for {host} here, which no other node reaches; name an interface "
            "(eth0) or an address"
        )
    return host


def facing(address: Address) -> str:
    """The address of this machine's interface that faces the trainers'."""
    with socket.create_connection((address.host, address.port), timeout=JOIN_SECONDS) as probe:
        return probe.getsockname()[0]


def put(store: dist.Store, key: str, value: Any, token: str) -> None:
    """Store a JSON value under a key, in parts; their number and a signature come last and say that all are there."""
    data = json.dumps(value).encode()
    parts = [data[i : i + PART] for i in range(0, len(data), PART)]
    for number, part in enumerate(parts):
        store.set(f"{key}/{number}", part)
    store.set(key, f"{len(parts)} {_sign(token, key, data)}")


def take(store: dist.Store, key: str, token: str) -> Any:
    """The value of a key, removed from the store; None while it is not there (a stored value is never None).

    A value that was not signed with the run's token is left out, with a line that says so.
    """
    if not store.check([key]):
        return None
    number, signature = store.get(key).decode().split(" ")
    names = [f"{key}/{part}" for part in range(int(number))]
    data = b"".join(store.get(name) for name in names)
    for name in (*names, key):
        store.delete_key(name)
    if not hmac.compare_digest(signature, _sign(token, key, data)):
        print(f"refused {key}: its writer does not know this run's token", file=sys.stderr, flush=True)
        return None
    return json.loads(data)


def _sign(token: str, key: str, data: bytes = b"") -> str:
    """Shows that the writer of a key knows the token, without showing the token."""
    return hmac.new(token.encode(), key.encode() + b"\0" + data, "sha256").hexdigest()


def make_group(store: dist.Store, rank: int, size: int, host: str, device: torch.device) -> dist.ProcessGroup:
    """The group an adapter travels in: rank 0 is the trainer. NCCL between GPUs, else gloo on the interface `host`."""
    if device.type == "cuda":
        return dist.ProcessGroupNCCL(store, rank, size, dist.ProcessGroupNCCL.Options())
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=JOIN_SECONDS)
    return dist.ProcessGroupGloo(store, rank, size, options)
