"""Notices within seconds that another process of the run is gone, however long the living ones take.

A timeout cannot tell a dead process from one that is busy, and NCCL has nothing else. So every process keeps a connection to
rank 0 open on which nothing is sent: when a process dies its system closes the connection, and when a machine dies the
system at the other end finds that out (keepalive). Neither needs the busy process to do anything.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from typing import Protocol

from mmkit.errors import LostError

logger = logging.getLogger(__name__)
_KEY = "mmkit/liveness"
# What a process says first: the token of the run and its rank.
_HELLO = struct.Struct("!16sI")
_GOODBYE = b"x"
# A machine that vanishes without a word: 15 s of silence, then four questions 5 s apart.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
# Long enough for the main thread to end by itself with its own message, short enough to be gone within the minute.
GRACE_SECONDS = 15.0
_CONNECT_SECONDS = 30.0


class Store(Protocol):
    """What is needed of torch's store: the place where processes find each other."""

    def set(self, key: str, value: str) -> None:
        """Publish."""
        ...

    def get(self, key: str) -> bytes:
        """Wait for a key and read it."""
        ...


class Liveness:
    """Connections between rank 0 and each other process, and a thread that watches them.

    Attributes:
        lost: Set when a process went without saying goodbye.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Store,
        *,
        goes_on: str = "the last checkpoint",
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        """Connect and begin to watch; every process must come here.

        Args:
            rank: This process.
            world_size: Number of processes.
            store: Reaches all processes.
            goes_on: What the same command goes on from after a loss.
            leave: Ends this process when it did not end by itself after another one was lost.
        """
        self.lost = threading.Event()
        self._rank, self._world_size, self._goes_on, self._leave = rank, world_size, goes_on, leave
        self._who = "another process"
        self._closing = threading.Event()
        self._peers: dict[socket.socket, int] = {}
        # A pair of sockets, so that the thread, which sleeps in select, hears of the end.
        self._wake_read, self._wake_write = socket.socketpair()
        # A star and not a net: when any process is lost rank 0 ends, and by that all others.
        if rank == 0:
            self._accept(store)
        else:
            self._connect(store)
        # A daemon: it must not keep a process alive that has nothing else to do.
        self._thread = threading.Thread(target=self._watch, name="mmkit-liveness", daemon=True)
        self._thread.start()

    def _accept(self, store: Store) -> None:
        """Rank 0: wait for the others."""
        # The token keeps out whatever else looks for open ports on a shared network.
        token = os.urandom(16)
        # Both kinds of address where the machine can: the launcher may have given either.
        six = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if six else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=six, backlog=self._world_size) as server:
            # Only now that it listens: whoever reads the port calls at once.
            store.set(_KEY, f"{server.getsockname()[1]} {token.hex()}")
            server.settimeout(_CONNECT_SECONDS)
            while len(self._peers) < self._world_size - 1:
                try:
                    peer, _ = server.accept()
                except TimeoutError:
                    # Who could not connect says so there; without a connection the collectives' timeout is what is left.
                    break
                hello = _receive(peer, _HELLO.size)
                if hello[:16] == token and len(hello) == _HELLO.size:
                    self._peers[_kept_alive(peer)] = _HELLO.unpack(hello)[1]
                else:
                    peer.close()

    def _connect(self, store: Store) -> None:
        """Another rank: connect to rank 0, which the launcher's address names."""
        port, token = store.get(_KEY).decode().split()
        try:
            peer = socket.create_connection((os.environ.get("MASTER_ADDR", "127.0.0.1"), int(port)), timeout=_CONNECT_SECONDS)
            peer.sendall(_HELLO.pack(bytes.fromhex(token), self._rank))
        except OSError as error:
            logger.error("process %d cannot watch process 0 (%s); a loss shows by timeout only", self._rank, error)
            return
        self._peers[_kept_alive(peer)] = 0

    def _watch(self) -> None:
        """The thread: sleep until a connection says something."""
        while not self._closing.is_set():
            ready, _, _ = select.select([*self._peers, self._wake_read], [], [])
            for peer in ready:
                if peer is not self._wake_read and not self._hear(peer):
                    self._end()
                    return

    def _hear(self, peer: socket.socket) -> bool:
        """Whether a process that was heard of went in order."""
        try:
            said = peer.recv(1)
        except OSError:
            # A reset, or keepalive had no answer: as good as closed.
            said = b""
        rank = self._peers.pop(peer)
        peer.close()
        in_order = said == _GOODBYE or self._closing.is_set()
        if not in_order:
            self._who = f"process {rank} of {self._world_size}"
            self.lost.set()
        return in_order

    def _end(self) -> None:
        """Give the main thread time to end by itself; it may hang in a collective for ever."""
        if not self._closing.wait(GRACE_SECONDS):
            logger.error("%s", self.describe())
            # The whole process: sys.exit would end this thread alone. With 1: at 75 a scheduler would start it again for ever.
            self._leave(1)

    def describe(self) -> str:
        """One line about the loss."""
        return f"{self._who} was lost; run the same command to go on from {self._goes_on}"

    def explain(self, error: RuntimeError, *, wait: float = 5.0) -> RuntimeError:
        """What an error of a collective really means.

        Args:
            error: What the collective raised.
            wait: Seconds to wait for the connection to close, which may take a moment longer than the collective's own.

        Returns:
            A :class:`LostError` when a process was lost, the error itself otherwise.
        """
        return LostError(self.describe()) if self.lost.wait(wait) else error

    def close(self, *, patience: float = 30.0) -> None:
        """Say goodbye; rank 0 waits for the others', since the store that they may still ask lives in it."""
        if self._closing.is_set():
            return
        if self._rank != 0:
            # First of all: from the goodbye on rank 0 may be gone at any moment, and that is no loss.
            self._closing.set()
            # A copy: the watching thread may take rank 0 off it.
            for peer in list(self._peers):
                with contextlib.suppress(OSError):
                    peer.sendall(_GOODBYE)
        elif not self.lost.is_set():
            self._await_goodbyes(patience)
        self._closing.set()
        # The thread's end of the pair becomes readable by that.
        self._wake_write.close()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5)
        for peer in [*self._peers, self._wake_read]:
            peer.close()

    def _await_goodbyes(self, patience: float) -> None:
        """Wait until all others have gone, or ``patience`` seconds."""
        for _ in range(int(patience / 0.05)):
            # The watching thread takes them off the list.
            if not self._peers or self.lost.wait(0.05):
                return


def _kept_alive(peer: socket.socket) -> socket.socket:
    """Have the system ask now and then whether the other end is still there."""
    # Silence is the rule here and no fault.
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        # Linux has all three; elsewhere the system's own values stay.
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer


def _receive(peer: socket.socket, size: int) -> bytes:
    """Exactly ``size`` bytes; fewer when the other end closed, broke off or has nothing to say."""
    # Short: whoever belongs to the run says hello at once, and the others of the run are waiting.
    peer.settimeout(5)
    found = b""
    with contextlib.suppress(OSError):
        while len(found) < size and (more := peer.recv(size - len(found))):
            found += more
    return found
