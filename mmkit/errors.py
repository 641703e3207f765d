"""The ways a command ends early other than by a bug, and the exit codes that go with them.

Everything else that escapes is a bug and exits with 1 and a traceback.
"""

from __future__ import annotations

# Two wherever the user is at fault, as the command-line parser's own; 75 is EX_TEMPFAIL of sysexits.h: try again later.
EXIT_DONE = 0
EXIT_BUG = 1
EXIT_INPUT = 2
EXIT_STOPPED = 75


class InputError(ValueError):
    """The user's input is wrong: one line that says what, where, and how to mend it (exit code 2)."""

    def __init__(self, what: str, *, where: object = None, mend: str = "") -> None:
        """Join the three parts into ``where: what; mend``.

        Args:
            what: What is wrong, with the offending value.
            where: File, line or key the fault lies in.
            mend: What the user can do about it.
        """
        self.what, self.where, self.mend = what, where, mend
        text = f"{where}: {what}" if where is not None else what
        super().__init__(f"{text}; {mend}" if mend else text)


class StoppedError(RuntimeError):
    """A signal asked the run to stop and a checkpoint was written; the same command continues (exit code 75)."""


class LostError(RuntimeError):
    """Another process of the run is gone, so this one cannot go on (exit code 1; the same command continues).

    Not 75: a scheduler that starts again on 75 would do so for ever where the other process ends by a bug.
    """
