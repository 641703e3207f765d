"""Checkpoints that are complete or absent, written while training goes on, and checked before they are used.

A checkpoint is written into a hidden folder beside, flushed, and renamed; so a folder with the right name is whole. What a disk
does to it afterwards shows in its checksums. Random numbers are not part of it: the loop seeds them from (seed, step, rank), so
they are a function of the step, like the data order.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmkit.distributed.engine import Engine
from mmkit.distributed.snapshot import StateFile
from mmkit.errors import InputError
from mmkit.files import disk_trouble, hash_file, hash_text, read_json, sync, write_json

logger = logging.getLogger(__name__)
# Eight digits, so that names sort as steps do; x-cls/superclass picks an older file because step_ sorts behind epoch_.
_NAME = re.compile(r"step-(\d{8})")
# Behind the name, so that _NAME matches it no more.
_ASIDE = ".bad"
# How long a process that ends by an error waits for the others' pieces of a checkpoint that is being written.
_PATIENCE = 10.0


@dataclasses.dataclass
class _Job:
    """One checkpoint on its way to the disk: this process's files, and on the main process what makes it complete."""

    step: int
    written: Future[float]
    completed: Future[float] | None
    stall: float = 0.0
    counted: bool = False

    @property
    def ending(self) -> Future[float]:
        """The last part of it here."""
        return self.completed or self.written


class Saver:
    """Writes checkpoints in the background. A failure is kept until all processes can hear of it at the same step."""

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        *,
        keep: int,
        background: bool = True,
        protected: Callable[[list[int]], set[int]] | None = None,
    ) -> None:
        """Nothing is written yet.

        Args:
            engine: Holds weights and optimizer.
            folder: The run's ``checkpoints``.
            keep: How many to keep.
            background: Write while training goes on; the twin of this is for tests and benchmarks.
            protected: From the steps that are kept, those that have to be kept besides (the best so far).
        """
        self._protected = protected or (lambda steps: set())
        self.engine, self.folder, self.keep, self.background = engine, folder, keep, background
        # One worker: the files of this process first, then the completion, in order.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mmkit-save")
        self._abandon = threading.Event()
        self._job: _Job | None = None
        self._ended: list[tuple[float, float]] = []
        self.totals = {"count": 0.0, "stall_seconds": 0.0, "write_seconds": 0.0}

    def save(self, step: int) -> None:
        """Take a snapshot and begin to write it as ``step-XXXXXXXX`` (a collective call).

        Args:
            step: Updates done so far.

        Raises:
            InputError: The checkpoint before could not be written.
        """
        began = time.monotonic()
        # One at a time: two would need twice the memory, and the older one could overtake the newer.
        self.wait()
        # The only part that training has to wait for.
        files, copied = self.engine.snapshot()
        written = self._pool.submit(self._write_files, files, step)
        completed = self._pool.submit(self._complete, step, written) if self.engine.is_main else None
        self._job = _Job(step, written, completed)
        if not copied:
            # Only for what this process writes itself: the others may have had the memory and be on their way to the next step.
            written.exception()
        if not self.background:
            self._finish(self._job)
        self._job.stall = time.monotonic() - began

    @property
    def failed(self) -> bool:
        """Whether this process knows of a failure; never waits."""
        # Asked in every step: the answer travels in the step's one sum, so that all processes stop at the same step.
        parts = [self._job.written, self._job.completed] if self._job is not None else []
        return any(part is not None and part.done() and part.exception() is not None for part in parts)

    def wait(self) -> None:
        """Wait until the checkpoint on its way is complete (a collective call).

        Raises:
            InputError: The disk is full, read-only or broken; the older checkpoints are whole, the half-written one is gone.
        """
        if self._job is not None:
            self._finish(self._job)
            self._count(self._job)
            self._job = None

    def _finish(self, job: _Job) -> None:
        """Wait until a checkpoint is complete."""
        self._check(job, job.written)
        # Only now is it certain that the main process does not wait for files that will never come.
        self._check(job, job.completed)

    def _count(self, job: _Job) -> None:
        """Take down the seconds of a save that has ended, once."""
        if not job.counted and job.ending.done() and job.ending.exception() is None:
            job.counted = True
            self._ended.append((job.stall, job.ending.result()))
            for name, value in zip(self.totals, (1.0, *self._ended[-1]), strict=True):
                self.totals[name] += value

    def _check(self, job: _Job, part: Future[float] | None) -> None:
        """Wait for a part on all processes, and end all of them if it failed on one."""
        error = None if part is None else part.exception()
        # Writing may take longer than a collective waits.
        self.engine.barrier()
        if not float(self.engine.sum(self.engine.numbers(error is not None))):
            return
        self._abandon.set()
        if job.completed is not None:
            job.completed.exception()
            # No process writes any more: all of them have come here. The space may be what is missing.
            shutil.rmtree(self._temporary(job.step), ignore_errors=True)
        self._job = None
        # In words for the user where the disk is to blame; anything else is a bug and keeps its traceback.
        trouble = disk_trouble(error, self.folder) or (error if isinstance(error, InputError) else None)
        line = "" if trouble is None else self._line(trouble, job.step)
        told = [text for text in self.engine.gather([line]) if text]
        if error is not None and trouble is None:
            raise error
        # Without a line it is a bug in another process, which shows its traceback there.
        raise InputError(told[0]) if told else RuntimeError(f"writing the checkpoint of step {job.step} failed elsewhere")

    def _line(self, trouble: InputError, step: int) -> str:
        """What the user reads of a checkpoint that could not be written."""
        last = newest_step(self.folder)
        whole = f"the checkpoint of step {last} is whole" if last else "there is none before it"
        what = f"the checkpoint of step {step} {trouble.what}; {whole}"
        return str(InputError(what, where=self.folder, mend=trouble.mend))

    def times(self) -> dict[str, float]:
        """Seconds that training stood still and that writing took, of saves that ended since the last call; empty without."""
        # Without waiting: a save that is still being written is told of later.
        if self._job is not None:
            self._count(self._job)
        ended, self._ended = self._ended, []
        if not ended:
            return {}
        return {"save_stall_seconds": sum(stall for stall, _ in ended), "save_write_seconds": sum(write for _, write in ended)}

    def close(self) -> None:
        """Let what is being written come to its end, for a while; not collective, so that it may follow any error."""
        job, self._job = self._job, None
        # A process that was lost will never write its part.
        deadline = time.monotonic() + _PATIENCE
        while job is not None and not job.ending.done() and time.monotonic() < deadline:
            time.sleep(0.05)
        self._abandon.set()
        self._pool.shutdown(wait=True)

    def _temporary(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}"

    def _write_files(self, files: list[StateFile], step: int) -> float:
        """In the background: this process's files, then the list of them with their checksums. Returns the seconds it took."""
        began = time.monotonic()
        temporary = self._temporary(step)
        # All processes write into one folder; whichever is first makes it.
        temporary.mkdir(parents=True, exist_ok=True)
        hashes = {}
        for file in files:
            file.write(temporary)
            # Read back from the file: a checksum of what was in memory would bless a bad write.
            hashes[file.name] = hash_file(temporary / file.name)
        write_json(temporary / _list_name(self.engine.rank), hashes)
        return time.monotonic() - began

    def _complete(self, step: int, written: Future[float]) -> float:
        """In the background of the main process: wait for all files, then make a checkpoint of the folder."""
        # It ran before this on the same thread; without these files there is nothing to complete.
        seconds = written.result()
        began = time.monotonic()
        temporary, target = self._temporary(step), checkpoint_at(self.folder, step)
        lists = [temporary / _list_name(rank) for rank in range(self.engine.world_size)]
        # Looked for, not waited for by a collective: those belong to the thread that trains.
        while not all(path.is_file() for path in lists):
            if self._abandon.wait(0.02):
                raise InputError("is incomplete, another process did not write its part", where=temporary)
        files = {name: digest for path in lists for name, digest in read_json(path).items()}
        # Last: a folder without it is no checkpoint, whatever else is in it.
        state = {"step": step, "world_size": self.engine.world_size, "files": files}
        write_json(temporary / "state.json", {**state, "checksum": _checksum(state)})
        # They have done their work, and are no part of the checkpoint.
        for path in lists:
            path.unlink()
        # The files are flushed already, by who wrote them; a folder's names are data too.
        for path in [*(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
            sync(path)
        if target.exists():
            # One that could not be used; a folder cannot be renamed over another.
            _put_aside(target)
        temporary.replace(target)
        sync(self.folder)
        # Only after the new one is complete: at no time are there fewer than before.
        found = list_checkpoints(self.folder)
        wanted = self._protected([step_of(path) for path in found[-self.keep :]])
        for old in found[: -self.keep]:
            if step_of(old) not in wanted:
                _remove(old)
        return seconds + time.monotonic() - began


def _list_name(rank: int) -> str:
    """The file in which a process lists what it wrote."""
    return f"rank-{rank:05d}.json"


def _checksum(state: dict[str, Any]) -> str:
    """Of state.json itself, without its checksum."""
    return hash_text(json.dumps({k: v for k, v in state.items() if k != "checksum"}, sort_keys=True))


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint; its name goes first, or a kill in between would leave half of one under the name of a whole."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    shutil.rmtree(checkpoint.replace(hidden))


def _put_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint that cannot be used, so that it is never counted again and can still be looked at."""
    # The same step may be damaged twice, and neither may overwrite the other.
    taken = [checkpoint.with_name(checkpoint.name + _ASIDE + (f".{n}" if n else "")) for n in range(1000)]
    return checkpoint.replace(next(path for path in taken if not path.exists()))


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return [path for path in _named(folder) if (path / "state.json").is_file()]


def _named(folder: Path) -> list[Path]:
    """Folders with the name of a checkpoint, oldest first."""
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name)) if folder.is_dir() else []


def newest_step(folder: Path) -> int:
    """Updates that the newest complete checkpoint has behind it; 0 without one."""
    found = list_checkpoints(folder)
    return step_of(found[-1]) if found else 0


def checkpoint_at(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Updates that a checkpoint has behind it, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def faults(checkpoint: Path, *, share: slice = slice(None)) -> list[str]:
    """What is wrong with a checkpoint, by its checksums.

    Args:
        checkpoint: Its folder.
        share: Which of its files to read, so that processes can share the work.

    Returns:
        A reason for each fault; empty when it is sound, or so old that it has no checksums.
    """
    try:
        state = read_json(checkpoint / "state.json")
    except InputError as error:
        return [f"state.json: {error.what}"]
    # Those of mmkit 0.1 had nothing but these two; they are taken as they are.
    if not isinstance(state, dict) or (state.keys() != {"step", "world_size"} and state.get("checksum") != _checksum(state)):
        return ["state.json: content differs from its checksum"]
    found = []
    for name, digest in sorted(state.get("files", {}).items())[share]:
        path = checkpoint / name
        try:
            if hash_file(path) != digest:
                found.append(f"{name}: content differs from its checksum")
        except OSError as error:
            found.append(f"{name}: {error.strerror}")
    return found


def put_aside_unsound(engine: Engine, folder: Path) -> list[str]:
    """Check the newest checkpoints until one is sound, rename those that are not (a collective call).

    Returns:
        Names of the checkpoints that were renamed now, with the reason.

    Raises:
        InputError: There were checkpoints and none is sound: the run would begin anew without a word.
    """
    aside: list[str] = []
    # Taken before anything is renamed, so that all processes go through the same list.
    # By name alone: a folder that has lost its state.json must be set aside as well.
    for checkpoint in reversed(engine.gather([_named(folder)] if engine.is_main else [])[0]):
        found = faults(checkpoint, share=slice(engine.rank, None, engine.world_size))
        # Reading all of a checkpoint may take longer than a collective waits.
        engine.barrier()
        reasons = engine.gather(found)
        # Older ones are not read: they are looked at when they are needed.
        if not reasons:
            break
        aside.append(f"{checkpoint.name} ({reasons[0]})")
        if engine.is_main:
            moved = _put_aside(checkpoint)
            logger.warning("checkpoint %s is damaged (%s); set aside as %s", checkpoint.name, reasons[0], moved.name)
    engine.on_main(lambda: _clean(folder))
    return aside


def _clean(folder: Path) -> None:
    """Remove what kills left half-written; refuse a folder in which only damaged checkpoints are left."""
    if not folder.is_dir():
        return
    # Before any process writes: a stale list of files would pass for one of the next save.
    # Also those that a kill left while they were being deleted (`_remove`).
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    damaged = sorted(p.name for p in folder.glob(f"step-*{_ASIDE}*"))
    if damaged and not list_checkpoints(folder):
        raise InputError(
            f"no checkpoint is sound ({', '.join(damaged)})",
            where=folder,
            mend="put a good copy there, or --restart",
        )


def load_newest(engine: Engine, folder: Path) -> int:
    """Load the newest complete checkpoint; :func:`put_aside_unsound` has to come before.

    Returns:
        Updates done so far; 0 when there is no checkpoint.
    """
    # The main process says which: on a network disk another machine may still see one that was just set aside.
    found = engine.gather(list_checkpoints(folder)[-1:] if engine.is_main else [])
    if not found:
        return 0
    # The step is read from the same folder afterwards, so weights and step cannot be of two checkpoints.
    engine.load(found[0])
    return int(read_json(found[0] / "state.json")["step"])
