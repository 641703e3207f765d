from __future__ import annotations

from pathlib import Path

import pipeline
import pytest
from pair import Pair

HERE = Path(__file__).parent
_MADE: list[Pair] = []


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Two processes that have imported everything, for the orders of all gates."""
    pipeline.trained("align")
    _MADE.append(Pair(pipeline.environment(), tmp_path_factory.mktemp("pair") / "log"))
    return _MADE[-1]


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Let the processes go with the last test of this folder: they hold some gigabytes, and the session goes on for long."""
    if nextitem is None or nextitem.path.parent != HERE:
        while _MADE:
            _MADE.pop().close()
