"""What the host learns of each step, and what it does with it: logs, limits, faults, looks at the model."""

from __future__ import annotations

import collections
import dataclasses
import math
import time
import zlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mmkit.config import TrainConfig
from mmkit.data.skipped import LeftOut
from mmkit.distributed.engine import Engine
from mmkit.errors import InputError
from mmkit.run import Run
from mmkit.training.checkpoint import Saver
from mmkit.training.objective import Sizes, Stage
from mmkit.training.progress import ProgressLine
from mmkit.training.track import NoTracker, Tracker
from mmkit.training.validation import validate


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """What the loop needs besides the train section of the recipe."""

    seed: int
    workers: int
    max_skipped: float
    title: str
    prefetch: int = 2
    timeout: float = 0


@dataclasses.dataclass(frozen=True)
class Launched:
    """What the host itself knows of a step: updates done, learning-rate factor, seconds of waiting for data, keys, left out."""

    done: int
    lr_scale: float
    waited: float
    keys: list[str]
    left_out: list[LeftOut]


class Readback:
    """Brings a step's numbers to the host; on a GPU while the next step runs, so that neither waits for the other."""

    def __init__(self, device: torch.device, *, in_flight: int | None = None) -> None:
        """Keep ``in_flight`` steps on their way: one on a GPU, none on a CPU."""
        # On a CPU there is nothing to overlap, and a step late would only be a step late.
        self._on_gpu = device.type == "cuda"
        self._in_flight = int(self._on_gpu) if in_flight is None else in_flight
        self._queue: collections.deque[tuple[Tensor, torch.cuda.Event | None, Launched]] = collections.deque()

    def push(self, values: Tensor, launched: Launched) -> None:
        """Start to copy ``values`` float64[N] of a step."""
        event = None
        if self._on_gpu:
            # Pinned, or the copy would wait for the device after all.
            values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._queue.append((values, event, launched))

    def ready(self, *, everything: bool) -> Iterator[tuple[list[float], Launched]]:
        """Steps whose numbers are due, oldest first; ``everything`` waits for the device."""
        while len(self._queue) > (0 if everything else self._in_flight):
            values, event, launched = self._queue.popleft()
            if event is not None:
                # By now the step has been over for a whole step, so this does not wait but for `everything`.
                event.synchronize()
            yield values.tolist(), launched


class StepLog:
    """Metrics rows, progress, tracker, and the reasons to stop."""

    def __init__(
        self,
        stage: Stage,
        engine: Engine,
        run: Run,
        config: TrainConfig,
        settings: LoopSettings,
        tracker: Tracker | None,
        *,
        saver: Saver,
        start: int,
        total: int,
    ) -> None:
        self.saver = saver
        self.stage, self.engine, self.run, self.config, self.settings = stage, engine, run, config, settings
        self.tracker = tracker or NoTracker()
        self._progress = ProgressLine(settings.title, total, start=start, show=engine.is_main)
        self._total, self._logged = total, start
        self._window, self._waited, self._counted = time.monotonic(), 0.0, 0.0
        self._sizes = [0.0, 0.0, 0.0]

    def step(self, values: list[float], launched: Launched) -> bool:
        """Take in the numbers of a step, over all ranks.

        Args:
            values: Loss, gradient norm, what was counted, left out, signals, failed saves, sum of the keys' checksums, `Sizes`.
            launched: What this process knows of the step.

        Returns:
            Whether some process was asked to stop.

        Raises:
            InputError: Loss or gradient not finite, too many samples left out, or a checkpoint that could not be written.
        """
        loss, norm, counted, skipped, signals, unsaved, digest, *sizes = values
        # First of all: a row of NaN in metrics.jsonl would spoil the curves of the whole run.
        if not math.isfinite(loss + norm):
            self._not_finite(loss, norm, launched)
        self._waited += launched.waited
        self._counted += counted
        self._sizes = [total + now for total, now in zip(self._sizes, sizes, strict=True)]
        if skipped:  # the same on every rank, so all of them gather
            self.run.skip(self.engine.gather(launched.left_out))
            # What the index left out counts too, or a set could lose the limit twice over.
            listed = self.run.path / "skipped.jsonl"
            check_skipped(self.run.skipped, self.stage.counted_from, self.settings.max_skipped, where=listed)
        # The last step is always shown: a run shorter than log_every would leave no curve.
        if launched.done % self.config.log_every == 0 or launched.done == self._total:
            self._row(loss, norm, int(digest), launched)
        if unsaved:
            # Every rank sees the same sum, so all of them come here at the same step; it raises.
            self.saver.wait()
        return bool(signals)

    def _not_finite(self, loss: float, norm: float, launched: Launched) -> None:
        """Write down the whole batch, then stop.

        Raises:
            InputError: Always.
        """
        ranks = self.engine.gather([launched.keys])
        # As text: JSON has no nan.
        facts = {"step": launched.done, "loss": str(loss), "grad_norm": str(norm)}
        self.run.record("nonfinite.json", {**facts, "keys": {str(rank): keys for rank, keys in enumerate(ranks)}})
        check_finite(loss, norm, launched, where=self.run.path / "nonfinite.json")

    def _row(self, loss: float, norm: float, digest: int, launched: Launched) -> None:
        """A row of metrics.jsonl over the steps since the last one."""
        now = time.monotonic()
        # Since the last row and not since the last multiple of log_every: a continued run begins in between.
        seconds, steps = max(now - self._window, 1e-9), launched.done - self._logged
        row = {
            "step": launched.done,
            "samples": launched.done * self.config.batch_size,
            "loss": loss,
            # Of the groups without a rate of their own (`Stage.lr_of`); the others have the same factor.
            "lr": self.config.lr * launched.lr_scale,
            "grad_norm": norm,
            "counted": self._counted / steps,
            # The step's own and not a sum since the last row: two runs that log differently can still be compared.
            "batch_digest": digest,
            "samples_per_second": steps * self.config.batch_size / seconds,
            **self._lengths(steps * self.config.batch_size, seconds),
            # A share of the time, so that it can be read without knowing the speed.
            "data_wait": self._waited / seconds,
            "memory_gib": _memory_gib(self.engine.device),
            "seconds": now - self._window,
            **self.saver.times(),
        }
        self._write(launched.done, row)
        self._progress.update(launched.done, row)
        self._window, self._waited, self._counted, self._logged = now, 0.0, 0.0, launched.done
        self._sizes = [0.0, 0.0, 0.0]

    def _lengths(self, samples: int, seconds: float) -> dict[str, float]:
        """What there is to say of sequences: speed in tokens, shares of padding and of samples that were cut."""
        tokens, positions, cut = self._sizes
        # Of pictures alone there is nothing to say.
        if not positions:
            return {}
        return {
            # True tokens: with padding among them a badly packed run would look fast.
            "tokens_per_second": tokens / seconds,
            "supervised_per_sample": self._counted / samples,
            "padding": 1 - tokens / positions,
            "cut": cut / samples,
        }

    def looks(self, done: int) -> dict[str, float]:
        """Validation and monitors that are due after ``done`` updates; every process comes here at the same step.

        Returns:
            All numbers that were found.
        """
        objective, config, last = self.stage.objective, self.config, done == self._total
        seen: dict[str, float] = {}
        began = time.monotonic()
        if self.stage.validation is not None and config.val_every and (done % config.val_every == 0 or last):
            how = self.settings
            numbers, left_out = validate(
                self.stage, self.engine, config, how.seed, how.workers, prefetch=how.prefetch, timeout=how.timeout
            )
            # Every rank comes here, whether it has something to report or not: gathering is a collective.
            self.run.skip(self.engine.gather(left_out))
            self._write(done, {"step": done, **numbers})
            seen |= numbers
        for monitor in self.stage.monitors:
            if done % monitor.every == 0 or last:
                objective.eval()
                # gathered: ZeRO-3 holds the weights in pieces, and a monitor calls the modules outside the engine.
                with torch.no_grad(), self.engine.gathered(), self.engine.autocast():
                    found = monitor.look(self.engine)
                if found.numbers:
                    self._write(done, {"step": done, **found.numbers})
                    seen |= found.numbers
                self.run.show([{"step": done, **row} for row in found.texts])
                for name, picture in found.pictures.items():
                    self.tracker.picture(done, name, picture)
        objective.train()
        # Speed is that of training: whatever row comes next, it does not hold the time of looking.
        self._window += time.monotonic() - began
        return seen

    def _write(self, done: int, row: dict[str, float]) -> None:
        """To metrics.jsonl and the tracker."""
        self.run.log(row)
        self.tracker.scalars(done, {k: v for k, v in row.items() if k != "step"})

    def close(self) -> None:
        """Remove the progress bar, finish the tracker."""
        self._progress.close()
        self.tracker.close()


def sum_sizes(sizes: Iterable[Sizes | None]) -> Sizes:
    """Sizes of several batches; 0 where samples have none."""
    found = [s for s in sizes if s is not None]
    return Sizes(sum(s.tokens for s in found), sum(s.positions for s in found), sum(s.cut for s in found))


def batch_digest(keys: list[str]) -> int:
    """Sum of the CRC-32 of the keys of a batch: the same in any order, and summed over ranks that of the global batch."""
    # Below 2**53 for two million samples, so float64 carries it exactly through the sum over ranks.
    # A checksum and not `hash`, which Python salts anew in every process; a key from a file name need not be valid UTF-8.
    return sum(zlib.crc32(key.encode(errors="backslashreplace")) for key in keys)


def check_finite(loss: float, norm: float, launched: Launched, *, where: object = None) -> None:
    """Stop rather than train on with broken weights; the device has left out the update already.

    Args:
        loss: Of the global batch.
        norm: Of the gradient.
        launched: Names step and samples.
        where: The file in which all samples are listed.

    Raises:
        InputError: Loss or gradient norm is not finite; names the step and its samples.
    """
    broken = "loss" if not math.isfinite(loss) else "gradient norm" if not math.isfinite(norm) else ""
    if broken:
        # Four are enough to find the shard; a global batch has thousands.
        keys = launched.keys
        raise InputError(
            f"{broken} is not finite at step {launched.done} (samples: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})",
            where=where,
            mend="lower train.lr, set train.clip_grad_norm, or look at these samples",
        )


def check_skipped(skipped: int, size: int, limit: float, *, where: object) -> None:
    """Refuse a data set of which too much is unusable.

    Raises:
        InputError: More than ``limit`` of ``size`` samples were left out.
    """
    # One is always allowed: a share of a small set would round to none.
    if skipped > max(1.0, limit * size):
        raise InputError(
            f"{skipped} of {size} samples cannot be used, over the limit of {limit:.2%}",
            where=where,
            mend="look at the reasons there; repair the data or raise data.max_skipped",
        )


def _memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the GPU's allocator, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Imported here: the module exists on Unix only.
    import resource

    # Linux gives KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
