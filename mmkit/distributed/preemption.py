"""A scheduler's signals become a flag that the loop reads between steps."""

from __future__ import annotations

import signal
from types import FrameType

# SIGTERM: a scheduler that takes the node; SIGUSR1: Slurm's early warning (--signal in slurm.sbatch); SIGINT: Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


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
