"""A dead process is noticed by its closed connection, a busy one is left alone; here within one process, over real sockets."""

from __future__ import annotations

import threading
import time

import pytest

from mmkit.distributed import liveness
from mmkit.distributed.liveness import Liveness
from mmkit.errors import LostError


class Store:
    """torch's store, for threads."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self.changed:
            self.values[key] = value.encode()
            self.changed.notify_all()

    def get(self, key: str) -> bytes:
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, 10)
            return self.values[key]


@pytest.fixture
def three(monkeypatch):
    """Three ranks that watch each other, and the exit codes they would leave with."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(liveness, "GRACE_SECONDS", 0.3)
    store, left, made = Store(), {}, {}

    def join(rank: int) -> None:
        made[rank] = Liveness(rank, 3, store, leave=lambda code: left.update({rank: code}))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    yield made, left
    for one in made.values():
        one.close(patience=0.2)


def die(one: Liveness) -> None:
    """What the system does for a killed process."""
    for peer in list(one._peers):
        peer.shutdown(2)


def test_all_go_in_order_and_nobody_is_lost(three):
    made, left = three
    threads = [threading.Thread(target=one.close) for one in made.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(one.lost.is_set() for one in made.values()) and not left


def test_silence_is_no_loss(three):
    made, left = three
    time.sleep(0.5)
    assert not any(one.lost.is_set() for one in made.values()) and not left


def test_a_loss_is_told_to_who_asks_and_ends_who_does_not(three, caplog):
    made, left = three
    die(made[2])
    assert made[0].lost.wait(10)
    error = made[0].explain(RuntimeError("Connection closed by peer [127.0.0.1]:4711"))
    assert isinstance(error, LostError)
    assert str(error) == "process 2 of 3 was lost; run the same command to go on from the last checkpoint"
    # Rank 0 hangs in a collective: it is ended, and then the others hear of it.
    deadline = time.monotonic() + 10
    while left.get(0) != 1:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)
    assert "process 2 of 3 was lost" in caplog.text
    die(made[0])
    assert made[1].lost.wait(10) and made[1].describe().startswith("process 0 of 3 was lost")


def test_an_error_without_a_loss_stays_what_it_is(three):
    made, _ = three
    error = RuntimeError("a bug")
    assert made[1].explain(error, wait=0.1) is error


def test_strangers_do_not_count(monkeypatch):
    # Something on the network that tries open ports must neither be taken for a rank nor stop the ranks.
    import socket

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    store = Store()
    made = {}
    first = threading.Thread(target=lambda: made.update({0: Liveness(0, 2, store)}))
    first.start()
    port = int(store.get("mmkit/liveness").split()[0])
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: nobody\r\n\r\n")
    made[1] = Liveness(1, 2, store)
    first.join(10)
    assert list(made[0]._peers.values()) == [1]
    made[1].close()
    made[0].close()
    assert not made[0].lost.is_set()
