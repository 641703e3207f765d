"""Fixtures of the report's tests; what they build is in report_runs.py."""

from __future__ import annotations

from report_runs import runs, world

__all__ = ["runs", "world"]
