"""Time and memory of functions that are compared."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch

# The profiler's library writes its own log to standard error otherwise; read when it is first used.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def interleaved(contenders: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each contender, taken in turns so that a slow spell of the machine hits all of them.

    Args:
        contenders: Name to function.
        repeats: Timed rounds.
        warmup: Rounds before that.

    Returns:
        Name to median seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(warmup + repeats):
        for name, work in contenders.items():
            # The garbage of one contender is not collected on the clock of the next.
            gc.collect()
            began = _now()
            work()
            if round_ >= warmup:
                times[name].append(_now() - began)
    # Not the mean: one interruption of a shared machine would move it.
    return {name: statistics.median(found) for name, found in times.items()}


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes of temporary tensors alive at one time during ``work``: beyond what is alive before, and what it returns.

    On the GPU the allocator's own count (what is returned counts in full, at every time); on the CPU every allocation of torch
    as its profiler reports it.
    """
    # What is left of before would be freed while the work runs, and hide as much of what that takes.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = work()
        torch.cuda.synchronize()
        # Measured while the result is held: what every contender has to return is no temporary.
        returned = torch.cuda.memory_allocated(device) - before
        del held
        return torch.cuda.max_memory_allocated(device) - before - returned
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        held = work()
    del held
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    # Every allocation is an event with its bytes, every release one with the bytes negative.
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "torch's profiler recorded no memory events"
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return _peak_of_temporaries(sizes)


def _peak_of_temporaries(sizes: Sequence[int]) -> int:
    """Largest sum of what is allocated and later released, from bytes allocated (> 0) and released (< 0) in order."""
    released: Counter[int] = Counter()
    temporary = []
    for size in reversed(sizes):
        # From the end: an allocation belongs to a release of its size that comes after it, or it is a result.
        if size < 0:
            released[-size] += 1
        elif released[size]:
            released[size] -= 1
        else:
            continue
        temporary.append(size)
    now = peak = 0
    for size in reversed(temporary):
        now += size
        peak = max(peak, now)
    return peak


def _now() -> float:
    """Seconds, after the GPU has finished."""
    # Kernels run behind the caller's back; without this only their launch would be timed.
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
