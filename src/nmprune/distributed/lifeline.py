"""One TCP connection of every process to process 0: how it closes tells how a process ended.

torch's collectives fail or hang when a process is gone, some at once and some after their timeout, and do not say which one
it was. The operating system closes a dead process's sockets within milliseconds, and keep-alive probes find a dead host.
"""

from __future__ import annotations

import json
import secrets
import selectors
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_CONNECT_SECONDS = 120.0
# A host that is gone sends nothing: probes after 10 s of silence, 3 s apart, and 4 without an answer are the end.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 4}
_LONGEST_LINE = 1 << 16


class Lifeline:
    """Knows whether the other processes are there.

    Args:
        rank: of this process.
        world_size: how many there are.
        connections: to every other process from process 0, to process 0 from the others; by rank.

    Attributes:
        working: whether a run is being done; who leaves while none is, is not missed.
        lost: which process ended before its time and how, in words; None as long as none did.
        told: whether the main thread has raised it.
    """

    def __init__(self, rank: int, world_size: int, connections: dict[int, socket.socket]) -> None:
        self._rank, self._world_size, self._connections = rank, world_size, connections
        self._is_lost = threading.Event()
        self._left: set[int] = set()
        self._watcher: threading.Thread | None = None
        self.working = False
        self.told = False
        self.lost: str | None = None

    @classmethod
    def open(cls, rank: int, world_size: int, address: str, tell: Callable[[Any], Any]) -> Lifeline:
        """Connect every process with process 0.

        Args:
            rank: of this process.
            world_size: how many there are.
            address: of process 0's host.
            tell: gives everyone what process 0 says.

        Raises:
            OSError: they do not reach each other.
        """
        if rank:
            port, token = tell(None)
            connection = socket.create_connection((address, port), timeout=_CONNECT_SECONDS)
            connection.sendall(_line({"token": token, "rank": rank}))
            return cls(rank, world_size, {0: _kept_alive(connection)})
        with _listening() as server:
            token = secrets.token_hex(16)
            tell([server.getsockname()[1], token])
            return cls(rank, world_size, _accepted(server, world_size, token))

    def watch(self, end: Callable[[], None]) -> None:
        """Watch from now on; `end` is called, in another thread, once a process was lost."""
        self._watcher = threading.Thread(target=self._watch, args=(end,), daemon=True)
        self._watcher.start()

    def verdict(self, seconds: float) -> str | None:
        """`lost`, waiting so long for it to become known."""
        self._is_lost.wait(seconds)
        return self.lost

    def say(self, message: dict[str, Any]) -> None:
        """Tell whoever is at the other ends."""
        for connection in self._connections.values():
            with suppress(OSError):
                connection.sendall(_line(message))

    def close(self) -> None:
        """Leave; nobody will miss this process."""
        self.working = False
        self.say({"left": self._rank})
        for connection in self._connections.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if self._watcher is not None:
            self._watcher.join(1.0)
        for connection in self._connections.values():
            connection.close()

    def _watch(self, end: Callable[[], None]) -> None:
        with selectors.DefaultSelector() as selector:
            unread: dict[int, bytes] = {}
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
                unread[rank] = b""
            while unread and self.lost is None:
                for key, _ in selector.select():
                    data = _received(key.fileobj)  # type: ignore[arg-type]
                    *lines, unread[key.data] = (unread[key.data] + data).split(b"\n")
                    for line in lines:
                        self._hear(key.data, json.loads(line))
                    if not data:
                        selector.unregister(key.fileobj)
                        del unread[key.data]
                        self._gone(key.data)
        if self.lost is not None:
            end()

    def _hear(self, rank: int, message: dict[str, Any]) -> None:
        if "left" in message:
            self._left.add(rank)
        elif "stopped" in message:
            self._lose(f"process {rank} of {self._world_size} stopped: {message['stopped']}".rstrip("."))
        elif "lost" in message:
            self._lose(message["lost"])

    def _gone(self, rank: int) -> None:
        if self.working and rank not in self._left:
            self._lose(f"process {rank} of {self._world_size} was lost (killed, out of memory, or its host is gone)")

    def _lose(self, words: str) -> None:
        if self.lost is None:
            self.lost = words
            if self._rank == 0:
                self.say({"lost": words})
            self._is_lost.set()  # last: the main thread may end this process at once, and the others must know by then


def _listening() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _accepted(server: socket.socket, world_size: int, token: str) -> dict[int, socket.socket]:
    """The other processes' connections, by rank; whoever does not know the token is none of them."""
    server.settimeout(_CONNECT_SECONDS)
    found: dict[int, socket.socket] = {}
    while len(found) < world_size - 1:
        connection, _ = server.accept()
        connection.settimeout(_CONNECT_SECONDS)
        try:
            hello = json.loads(_first_line(connection))
            known = secrets.compare_digest(str(hello["token"]), token)
        except (OSError, ValueError, KeyError, TypeError):
            known = False
        if known:
            found[int(hello["rank"])] = _kept_alive(connection)
        else:
            connection.close()
    return found


def _first_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
        letter = connection.recv(1)
        if not letter:
            break
        line += letter
    return line


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(_LONGEST_LINE)
    except OSError:
        return b""


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
