"""A scheduler's signals become a flag that the loop reads between steps."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from mmkit.errors import EXIT_STOPPED

# SIGTERM: a scheduler that takes the node; SIGUSR1: Slurm's early warning (--signal in slurm.sbatch); SIGINT: Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextlib.contextmanager
def leave_on_signals() -> Iterator[None]:
    """A block in which SIGTERM and SIGUSR1 end this process with exit code 75, except where a :class:`Preemption` listens.

    For the seconds in which libraries are imported, data looked through and scores printed: nothing is under way that could be
    saved, and a scheduler must be able to tell its own signal from a bug.
    """
    # Not in children, which inherit the handlers: pools end their workers by SIGTERM.
    own = os.getpid()

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        # Neither print nor an exception: the signal may come in the middle of either, or of an import that catches all errors.
        if int(os.environ.get("RANK", "0")) == 0:
            os.write(2, f"mmkit: stopped by {signal.Signals(number).name}; the same command goes on\n".encode())
        os._exit(EXIT_STOPPED)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Preemption:
    """Remembers that SIGTERM, SIGUSR1 or SIGINT came; a second SIGINT ends the process at once. May be entered again inside."""

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}
        self._depth = 0

    def __enter__(self) -> Preemption:
        self._depth += 1
        # The caller holds on to it while it saves the product, the loop within enters it again: one set of handlers for both.
        if self._depth > 1:
            return self
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        # Put back: after the loop nobody reads the flag, and the signals would have no effect at all.
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A step can hang; the user who asks twice does not want to wait for its end.
        if self.requested is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        # No more than a flag: a checkpoint is a collective call, and the ranks may be at different places when the signal comes.
        self.requested = signal.Signals(number)
