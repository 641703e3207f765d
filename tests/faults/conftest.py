from __future__ import annotations

from collections.abc import Iterator

import pipeline
import pytest
from zygote import Zygote


@pytest.fixture(scope="package")
def zygote() -> Iterator[Zygote]:
    """Starts children that have everything imported already."""
    for stage in ("superclass", "align"):
        pipeline.trained(stage)
    made = Zygote(pipeline.environment())
    yield made
    made.close()
