"""Processes that share out work without computing together: they meet, pass a word on, and hear when one of them is lost.

An evaluation sends no tensors between processes, so it needs no process group, only the store through which a launcher's
processes find each other.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any

import torch

from mmkit.distributed.liveness import Liveness
from mmkit.distributed.preemption import Preemption
from mmkit.errors import InputError, LostError, StoppedError

# Between two looks at whether another process was lost or told to stop.
_LOOK = datetime.timedelta(seconds=0.5)


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
        """
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._preemption = preemption
        self._meetings = 0
        self._store: Any = None
        self._liveness: Liveness | None = None
        if self.world_size > 1:
            Ranks._made += 1
            store, _, _ = next(torch.distributed.rendezvous("env://", self.rank, self.world_size))
            # torchrun's store outlives a run: another one in these processes must not find the keys of the first.
            self._store = torch.distributed.PrefixStore(f"mmkit/ranks/{Ranks._made}", store)
            self._liveness = Liveness(self.rank, self.world_size, self._store)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this process computes: a GPU of its own where there is one."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())

    def look(self) -> None:
        """End this process if it has to end; between two pieces of work.

        Raises:
            StoppedError: This process or another one was told to stop.
            LostError: Another process is gone.
        """
        if self._liveness is not None and self._liveness.lost.is_set():
            raise LostError(self._liveness.describe())
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

    def _await(self, key: str) -> bytes:
        """The value of a key, once it is there."""
        while not self._store.check([key]):
            self.look()
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
        return error if self._liveness is None else self._liveness.explain(error)

    def close(self) -> None:
        """Leave in order: the others hear that this process is not lost."""
        if self._liveness is not None:
            self._liveness.close()
