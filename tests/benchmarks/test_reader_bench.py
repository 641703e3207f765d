"""The reader benchmark runs and gives every figure; how fast it is, is no test."""

from __future__ import annotations

import pytest

from mmkit.bench import run_bench


@pytest.mark.slow
def test_gives_figures_of_all_readers() -> None:
    pytest.importorskip("webdataset", reason="webdataset is an extra ([bench])")
    tiny = {"repeats": "1", "samples": "30", "picture_kb": "3", "per_shard": "10", "shards": "5"}
    found = run_bench("reader", {**tiny, "billion_shards": "70", "billion_per_shard": "20", "step": "900", "batch": "8"})
    numbers = {key: value for key, value in found.items() if not isinstance(value, str)}
    assert all(value >= 0 for value in numbers.values()) and len(numbers) == 15
    assert {"speed, mmkit / webdataset, in order", "speed, mmkit / datasets, streaming"} <= set(numbers)
    # Seconds into the fourth epoch of 1,400 samples: what was read there is checked by the benchmark itself.
    assert "going on there at step 900 of batch 8, s" in numbers
