"""Fixtures of the report's tests; what they build is in report_runs.py."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from report_runs import rich, runs, world

__all__ = ["browser", "rich", "runs", "world"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """The system's own Chromium, driven by Playwright; Playwright's downloads are not needed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (pip install playwright)")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on PATH (Debian: apt install chromium)")
    with playwright.sync_playwright() as driver:
        # Root has no sandbox to run it in, and a container's shared memory is small.
        found = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield found
        found.close()
