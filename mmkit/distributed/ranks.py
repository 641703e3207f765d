"""Processes that share out work without computing together: they meet, pass a word on, and hear when one of them is lost.

An evaluation sends no tensors between processes, so it needs no process group, only the store through which a launcher's
processes find each other.
"""

from __future__ import annotations

import datetime
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import torch

from mmkit.distributed.liveness import Liveness
from mmkit.distributed.preemption import Preemption
from mmkit.errors import InputError, LostError, StoppedError

# Between two looks at whether another process was lost or told to stop.
_LOOK = datetime.timedelta(seconds=0.5)
# Seconds. Thousands of tokens for each question of a full batch take minutes.
_LONGEST_BATCH = 1800.0
_GOES_ON = "the answers so far"


class Ranks:
    """The processes that a launcher started for one run.

    Attributes:
        rank: This process.
        world_size: Number of processes.
    """

    _made = 0

    def __init__(self, preemption: Preemption) -> None:
        """Join the processes that the launcher started.

        Args:
            preemption: What signals this process was sent; one that is told to stop stops them all.

        Raises:
            StoppedError: A signal came while the others were waited for.
            LostError: torchrun is gone.
        """
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._preemption = preemption
        self._meetings, self._closed = 0, False
        self._store: Any = None
        self._liveness: Liveness | None = None
        # torchrun holds the store; a shell that started the processes by hand may well go before them.
        self._torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._parent = os.getppid()
        if self.world_size > 1:
            Ranks._made += 1
            self._join()

    def _join(self) -> None:
        """Find the other processes, in a thread: torch waits for them for half an hour and hears no signal meanwhile."""
        failed: list[RuntimeError] = []

        def work() -> None:
            try:
                self._look_for_store()
                store, _, _ = next(torch.distributed.rendezvous("env://", self.rank, self.world_size))
                # torchrun's store outlives a run: another one in these processes must not find the keys of the first.
                self._store = torch.distributed.PrefixStore(f"mmkit/ranks/{Ranks._made}", store)
                self._liveness = Liveness(self.rank, self.world_size, self._store, goes_on=_GOES_ON)
            except RuntimeError as error:
                failed.append(error)

        # A daemon: where this process ends before the others come, it must not go on waiting.
        thread = threading.Thread(target=work, name="mmkit-join", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_LOOK.total_seconds())
            if thread.is_alive() and (asked := self._preemption.requested) is not None:
                raise StoppedError(f"stopped by {asked.name} before the processes had met; the same command begins again")
            self._look_at_launcher()
        if failed:
            raise failed[0]

    def _look_for_store(self) -> None:
        """Raises LostError: torchrun has gone before its worker came here."""
        if not self._torchrun:
            return
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            # It was there before its workers, and torch would go on trying where nobody answers any more.
            socket.create_connection(address, timeout=30).close()
        except OSError as error:
            what = f"torchrun's store at {address[0]}:{address[1]} cannot be reached ({error.strerror or error})"
            raise LostError(f"{what}; run the same command to go on from {_GOES_ON}") from None

    def _look_at_launcher(self) -> None:
        """Raises LostError: torchrun is gone, and the store with it."""
        if self._launcher_gone:
            raise LostError(self._describe_launcher())

    @property
    def _launcher_gone(self) -> bool:
        # Its workers are then given to another process.
        return self._torchrun and os.getppid() != self._parent

    @staticmethod
    def _describe_launcher() -> str:
        return f"torchrun, which started this process, is gone; run the same command to go on from {_GOES_ON}"

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this process computes: a GPU of its own where there is one."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        # Compiled kernels and pinned memory go by the current one, which is the first for all processes unless told.
        torch.cuda.set_device(device)
        return device

    def look(self) -> None:
        """End this process if it has to end; between two pieces of work.

        Raises:
            StoppedError: This process or another one was told to stop.
            InputError: Another process found that the user's input is wrong.
            LostError: Another process is gone.
        """
        if self._liveness is not None and self._liveness.lost.is_set():
            raise LostError(self._liveness.describe())
        self._look_at_launcher()
        # Before signals: a launcher sends them when it sees a process end.
        if self._store is not None and self._store.check(["refused"]):
            raise InputError(self._store.get("refused").decode())
        asked = self._preemption.requested
        if asked is not None and self._store is not None:
            # The others may not have been sent the signal; they would go on, and wait for this one.
            self._store.set("stop", asked.name)
        if asked is None and self._store is not None and self._store.check(["stop"]):
            raise StoppedError("another process was told to stop; the same command goes on from the answers so far")
        if asked is not None:
            raise StoppedError(f"stopped by {asked.name}; the same command goes on from the answers so far")

    def meet(self) -> None:
        """Wait for all processes, as long as it takes.

        Raises:
            StoppedError: One of them was told to stop.
            InputError: One of them found that the user's input is wrong.
            LostError: One of them is gone.
        """
        if self._store is None:
            return
        self._meetings += 1
        key = f"meeting/{self._meetings}"
        if self._store.add(key, 1) == self.world_size:
            self._store.set(f"{key}/open", "1")
        self._await(f"{key}/open")

    def on_main(self, work: Callable[[], None]) -> None:
        """Do something on the main process while the others wait; where it cannot be done, all processes end alike.

        Raises:
            InputError: What the main process raised.
        """
        if self._store is None:
            work()
            return
        self._meetings += 1
        key = f"main/{self._meetings}"
        error: InputError | None = None
        if self.is_main:
            try:
                work()
            except InputError as caught:
                error = caught
            self._store.set(key, "" if error is None else str(error))
        elif told := self._await(key).decode():
            error = InputError(told)
        if error is not None:
            # Together, and in order: whoever went first would look lost to those who have not heard yet.
            self.meet()
            self.close()
            raise error

    def refuse(self, error: InputError) -> None:
        """Tell all processes what is wrong with the user's input, as one of them found; returns when the main one has heard.

        Only the main process's last words are shown, and it has its own share of the questions.

        Raises:
            LostError: The main process is gone.
        """
        if self._store is None or self._closed:
            return
        try:
            if not self._store.check(["refused"]):
                self._store.set("refused", str(error))
            if self.is_main:
                self._store.set("refused/heard", "1")
            else:
                # No look in between, which would hear of what this process has just said.
                self._await("refused/heard", between=self._raise_if_lost)
        except LostError:
            raise
        except RuntimeError as broken:
            raise self.explain(broken) from None

    def _await(self, key: str, between: Callable[[], None] | None = None) -> bytes:
        """The value of a key, once it is there; ``between`` in place of `look`."""
        while not self._store.check([key]):
            (between or self.look)()
            try:
                # Not in one long wait: a process that is gone never sets anything.
                self._store.wait([key], _LOOK)
            except RuntimeError:
                # Its way to say that the time is up; a store that is gone itself is heard of below.
                self._raise_if_lost()
        found: bytes = self._store.get(key)
        return found

    def _raise_if_lost(self) -> None:
        """Raise LostError if another process is gone, after a moment in which its connection may close."""
        assert self._liveness is not None
        if self._liveness.lost.wait(0.01):
            raise LostError(self._liveness.describe())

    def explain(self, error: RuntimeError) -> RuntimeError:
        """What an error really means: LostError where another process is gone, the error itself otherwise."""
        if self._launcher_gone:
            return LostError(self._describe_launcher())
        return error if self._liveness is None else self._liveness.explain(error)

    def close(self) -> None:
        """Leave in order: the others hear that this process is not lost."""
        self._closed = True
        if self._liveness is not None:
            # The others may be in the middle of a batch, and hear of a stop after it. One that is lost is not waited for.
            self._liveness.close(patience=_LONGEST_BATCH)
