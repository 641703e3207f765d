"""Work on pieces of a data set in several processes, results in order."""

from __future__ import annotations

import collections
import logging
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from mmkit.errors import InputError

T = TypeVar("T")
J = TypeVar("J")
R = TypeVar("R")
# Jobs given out ahead for each process: none waits for work, and results that nobody takes do not pile up.
_AHEAD = 3
# In a worker: the function and what it shares among its jobs. Unpickled once, for it may be a list of millions of pairs.
_task: tuple[Callable[[Any, Any], Any], Any] | None = None


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(work: Callable[[T, J], R], shared: T, jobs: Sequence[J], workers: int | None = None) -> Iterator[R]:
    """``work(shared, job)`` for each job, in several processes; results come in the order of the jobs.

    Args:
        work: A function of a module, so that other processes can have it.
        shared: What all jobs need; pickled once.
        jobs: Pieces of work.
        workers: Processes; None: one for each core. One works in this process, and so does a single job.

    Raises:
        InputError: A process was killed, most likely for its memory.
    """
    workers = min(workers or cores(), len(jobs))
    if workers <= 1:
        for job in jobs:
            yield work(shared, job)
        return
    with tempfile.NamedTemporaryFile(prefix="mmkit-task-") as file:
        # Through a file: a process that dies while it starts leaves its parent for ever in the write of a long argument.
        pickle.dump((work, shared), file)
        file.flush()
        yield from _in_pool(file.name, jobs, workers)


def _in_pool(task: str, jobs: Sequence[Any], workers: int) -> Iterator[Any]:
    """Results of the jobs in order, by processes that take their task from a file."""
    # Spawned, not forked: this process may hold a GPU or threads. What they import is light; torch is not in it.
    context = multiprocessing.get_context("spawn")
    # A spawned process knows nothing of its parent's logging.
    level = logging.getLogger("mmkit").level
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(task, level))
    waiting: collections.deque[Future[Any]] = collections.deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(_run, job))
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        # A pool of multiprocessing would wait for the dead one's result for ever; this one notices.
        mend = "if it was for its memory, use fewer --workers"
        raise InputError("a worker process was killed", mend=mend) from None
    finally:
        # Reached early when the caller has had enough or Ctrl-C came: what was not begun is not done.
        pool.shutdown(wait=True, cancel_futures=True)


def _start(task: str, level: int) -> None:
    """Make a process ready for jobs."""
    global _task
    # Ctrl-C goes to the whole group: the main process says so once, the others go without a traceback each.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    logging.getLogger("mmkit").setLevel(level)
    with Path(task).open("rb") as file:
        _task = pickle.load(file)


def _leave_with_parent() -> None:
    """End when the main process is gone: killed outright, it cannot tell its workers, which would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        # Not sys.exit, which would end this thread alone.
        os._exit(1)


def _run(job: Any) -> Any:
    assert _task is not None, "started without its task"
    work, shared = _task
    return work(shared, job)
