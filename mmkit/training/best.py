"""Which step was the best by a validation number, and whether training has stopped getting better.

All of it is a function of the rows of metrics.jsonl up to a step, so that a run which was killed and goes on decides as one that
was not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mmkit.config import StoppingConfig
from mmkit.distributed.engine import Engine
from mmkit.errors import InputError
from mmkit.run import Run, read_jsonl
from mmkit.training.checkpoint import checkpoint_at, faults, newest_step


class Seen(NamedTuple):
    """A validation number after ``step`` updates."""

    step: int
    value: float


class Best:
    """Follows the number of ``train.early_stopping``; without that section it follows nothing and keeps nothing."""

    def __init__(self, config: StoppingConfig | None, engine: Engine, run: Run, *, every: Sequence[int]) -> None:
        """Take in what an earlier start of the run has seen (a collective call).

        Args:
            config: The section; None: the product is that of the last step.
            engine: The processes.
            run: Its metrics, without rows past the checkpoint that the run goes on from.
            every: After how many steps each of the looks comes.

        Raises:
            InputError: Nothing looks, or the checkpoint of the best step so far is gone.
        """
        self.config, self.engine, self.run, self._every = config, engine, run, every
        self.seen: list[Seen] = []
        if config is None:
            return
        # Told before the first step: nothing would ever end the run early, or say which step was the best.
        if not every:
            what = f"nothing gives {config.metric}: the run has neither validation nor a monitor"
            raise InputError(what, where="train.early_stopping", mend="give data.val and train.val_every, or a monitor")
        # The main process reads for all: on a network disk the others may see an older file.
        rows = read_jsonl(run.path / "metrics.jsonl") if engine.is_main else []
        found = [(row["step"], row[config.metric]) for row in rows if config.metric in row]
        self.seen = [Seen(*pair) for pair in engine.gather(found)]
        self._check_kept()

    def _check_kept(self) -> None:
        """Refuse to train on towards a product that could not be made."""
        best = self.at()
        if best is None:
            return
        # Missing on one process is enough, and all have to hear of it.
        if any(self.engine.gather([not (checkpoint_at(self.run.checkpoints, best.step) / "state.json").is_file()])):
            what = f"the checkpoint of the best step so far, {best.step}, is gone"
            raise InputError(what, where=self.run.checkpoints, mend="put it back, or --restart")

    def take(self, step: int, numbers: Mapping[str, float], *, last: bool) -> bool:
        """Take in what the looks after ``step`` updates have found (a collective call).

        Args:
            step: Updates done.
            numbers: By name, as they go into metrics.jsonl.
            last: Whether this is the last step, at which everything looks.

        Returns:
            Whether this step is the best so far, so that its weights have to be kept.

        Raises:
            InputError: No look gives the number that is asked for.
        """
        if self.config is None:
            return False
        if self.config.metric not in numbers:
            # As soon as everything has looked at once, and not at the end of the run.
            if not self.seen and (last or all(step % every == 0 for every in self._every)):
                what = f"no look at the model gives {self.config.metric}"
                raise InputError(what, where="train.early_stopping.metric", mend=f"looked at: {', '.join(sorted(numbers))}")
            return False
        # As metrics.jsonl has it, or a run that goes on would compare other digits; and the main process's, for all.
        value = self.engine.gather([_as_written(numbers[self.config.metric])])[0]
        before = self.at()
        self.seen.append(Seen(step, value))
        return self.at() != before

    def at(self, step: int | None = None) -> Seen | None:
        """The best as it stood after ``step`` updates; None: now."""
        # From all looks each time and not from a running best: `protected` asks for the best as of older steps.
        best: Seen | None = None
        for seen in self.seen:
            if (step is None or seen.step <= step) and (best is None or self._better(seen.value, best.value)):
                best = seen
        return best

    def _better(self, value: float, than: float) -> bool:
        """Whether a number beats the best; NaN beats nothing, and anything beats it."""
        assert self.config is not None
        if math.isnan(than):
            return not math.isnan(value)
        gain = value - than if self.config.mode == "max" else than - value
        return gain > self.config.min_delta

    @property
    def over(self) -> bool:
        """Whether patience has run out."""
        best = self.at()
        if self.config is None or self.config.patience is None or best is None:
            return False
        return sum(seen.step > best.step for seen in self.seen) >= self.config.patience

    def protected(self, steps: Iterable[int]) -> set[int]:
        """Steps whose checkpoints are needed besides those of ``steps``: the best as it stood at each of these.

        Whichever of them a run goes on from, because newer ones are damaged, its best is there.
        """
        return {best.step for step in steps if (best := self.at(step)) is not None}

    def restore(self) -> None:
        """Load the weights of the best step, unless the newest is the best, and say so in the manifest (a collective call).

        Raises:
            InputError: Its checkpoint is damaged.
        """
        best = self.at()
        if self.config is None or best is None:
            return
        # The main process's view, as ever: all have to load, or none.
        done = self.engine.gather([newest_step(self.run.checkpoints)] if self.engine.is_main else [])[0]
        # Otherwise the weights in memory are the best: every way to here saves the last step, or has loaded it.
        if best.step != done:
            folder = checkpoint_at(self.run.checkpoints, best.step)
            # At a start only the newest is read (put_aside_unsound), so this one may have been damaged unseen.
            found = self.engine.gather(faults(folder, share=slice(self.engine.rank, None, self.engine.world_size)))
            if found:
                raise InputError(f"the best checkpoint is damaged ({found[0]})", where=folder, mend="put a good copy there")
            self.engine.load(folder)
        verb = "risen" if self.config.mode == "max" else "fallen"
        why = f"{self.config.metric} has not {verb} for {self.config.patience} looks" if self.over else "all steps are done"
        self.run.note(
            best={"metric": self.config.metric, "value": best.value, "step": best.step}, ended={"step": done, "why": why}
        )


def _as_written(value: Any) -> float:
    """A number with the digits that metrics.jsonl keeps."""
    # The format of Run.log.
    return float(f"{float(value):.9g}")
