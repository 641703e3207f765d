"""``mmkit bench NAME``: each benchmark runs mmkit and its peer in one process, on the same input, and gives the ratio.

Absolute times on shared machines mean little; ratios of interleaved runs do. No test asserts a time.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from mmkit.errors import InputError

# name -> module; imported when asked for, because peers are slow to import.
BENCHMARKS = {
    "superclass-loss": "superclass_loss",
    "superclass-step": "superclass_step",
    "labels": "labels",
    "clipcap": "clipcap",
    "reader": "reader",
    "loader": "loader",
    "packing": "packing",
    "lm-loss": "lm_loss",
    "caption-metrics": "caption_metrics",
    "generation": "generation",
    "vqa-metrics": "vqa_metrics",
}

_SWITCH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def run_bench(name: str, options: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a benchmark.

    Args:
        name: One of `BENCHMARKS`.
        options: Its settings as text, such as ``{"batch": "256"}``; whole numbers, decimals and words.

    Returns:
        Conditions, figures of both sides and their ratios, in order of reading.

    Raises:
        InputError: An unknown benchmark or setting, or a value that is none.
    """
    if name not in BENCHMARKS:
        raise InputError(f"no benchmark {name!r}", mend=f"known: {', '.join(BENCHMARKS)}")
    run = importlib.import_module(f"mmkit.bench.{BENCHMARKS[name]}").run
    # The signature is the schema: names and the types of the defaults say what a setting may be.
    known = inspect.signature(run).parameters
    chosen: dict[str, Any] = {}
    for key, text in (options or {}).items():
        if key not in known:
            raise InputError(f"benchmark {name} has no setting {key!r}", mend=f"known: {', '.join(known)}")
        kind = type(known[key].default)
        try:
            # bool("false") is True.
            chosen[key] = _SWITCH[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            mend = "give true or false" if kind is bool else "give a number"
            raise InputError(f"{key}={text} is no {kind.__name__}", where=f"bench {name}", mend=mend) from None
    found: dict[str, Any] = run(**chosen)
    return found
