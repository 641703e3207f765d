"""The progress line of a run: on a terminal a live bar, in a log file a line now and then."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


class ProgressLine:
    """Shows step, loss, throughput and time left."""

    def __init__(self, title: str, total: int, *, start: int, show: bool, every_seconds: float = 10.0) -> None:
        self.title, self.total, self.show = title, total, show
        self._every = every_seconds
        self._start, self._began, self._last = start, time.monotonic(), 0.0
        self._bar: Progress | None = None
        # Redrawn in place, a bar would fill a log file with control characters.
        if show and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[info]}"))
            # On standard error, where the log goes: what a command prints on standard output is for other programs.
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(title, total=total, completed=start, info="")
            self._bar.start()

    def update(self, step: int, row: dict[str, Any]) -> None:
        """Show the state after ``step`` updates."""
        if not self.show:
            return
        info = f"loss {row['loss']:.3f}  {row['samples_per_second']:.0f} samples/s  {row['data_wait']:.0%} waiting for data"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, info=info)
            return
        now = time.monotonic()
        # The last step in any case, or a log would end before the run does.
        if now - self._last >= self._every or step == self.total:
            self._last = now
            # By the steps of this process: those before an interruption took none of its time.
            left = (now - self._began) / max(1, step - self._start) * (self.total - step)
            logger.info("%s: step %d/%d  %s  %.0f s left", self.title, step, self.total, info, left)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
