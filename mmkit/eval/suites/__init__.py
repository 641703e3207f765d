"""Suites: each owns one benchmark's official files, its rule, and what its evaluation server takes.

A suite is looked up by name and imported only then. Other packages add theirs by an entry point of the group ``mmkit.suites``
that names a `Suite` (in ``pyproject.toml``: ``[project.entry-points."mmkit.suites"]``, ``my-suite = "my_package.suite:SUITE"``).
"""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import entry_points

from mmkit.errors import InputError
from mmkit.eval.names import BUILT_IN, GROUP, suite_names
from mmkit.eval.suites.suite import Suite
from mmkit.recipes import suites_of_tasks

__all__ = ["BUILT_IN", "GROUP", "Suite", "find_suite", "suite_names"]


def find_suite(name: str) -> Suite:
    """The suite of this name.

    Raises:
        InputError: No such suite (with the nearest one), or an entry point that gives none.
    """
    if name in BUILT_IN:
        suite = importlib.import_module(f"{__name__}.{BUILT_IN[name]}").SUITE
        assert isinstance(suite, Suite)
        return suite
    points = {point.name: point for point in entry_points(group=GROUP)}
    if name not in points:
        near = difflib.get_close_matches(name, suite_names(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        # Easily mixed up: a task is a suite with data and a prompt.
        if suite := suites_of_tasks().get(name):
            what = f"{name!r} is a task of `mmkit eval`; a result file is scored by its suite"
            raise InputError(what, where="task", mend=f"use {suite}")
        raise InputError(f"unknown task {name!r}", where="task", mend=f"{hint}known: {', '.join(suite_names())}")
    found = points[name].load()
    if not isinstance(found, Suite):
        what = f"entry point {points[name].value} of task {name} is {type(found).__name__}, not a Suite"
        raise InputError(what, where=GROUP, mend="let it name an mmkit.eval.suites.suite.Suite")
    return found
