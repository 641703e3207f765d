from __future__ import annotations

from collections.abc import Iterator

import pipeline
import pytest
from pair import Pair


@pytest.fixture(scope="package")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes that have imported everything, for the orders of all gates."""
    pipeline.trained("align")
    made = Pair(pipeline.environment(), tmp_path_factory.mktemp("pair") / "log")
    yield made
    made.close()
