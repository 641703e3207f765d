"""ZeRO-3 hands a model out from the one process that has read it; no other ever holds it whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from modes import deepspeed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed on CPUs and CUDA do not mix in one environment"),
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read as Linux tells it"),
]
WIDTH, LAYERS = 1024, 24
SIZE = (LAYERS * (WIDTH + 1) * WIDTH + WIDTH) * 4


def test_a_skeleton_gets_its_pieces_and_never_more_than_a_parameter_beside(pair, tmp_path):
    settings = deepspeed(3, tmp_path)[0].partition("=")[2]
    found = {}
    for empty in (False, True):
        pair.call("driven:hand_out", settings=settings, out=str(tmp_path / "out"), width=WIDTH, layers=LAYERS, empty=empty)
        found[empty] = json.loads((tmp_path / "out").read_text())
    other = found[True][1]
    # Half of it, and room for one parameter on its way and for the allocator; a full copy would be twice that.
    assert other["rank"] == 1 and other["peak"] < 0.65 * SIZE, (other["peak"], SIZE)
    # Values are rank 0's, frozen and tied parts and the buffer too, and they train as those that every process had itself.
    assert [row["losses"] for row in found[True]] == [row["losses"] for row in found[False]]
    assert [row["again"] for row in found[True]] == [row["again"] for row in found[False]]
    assert found[True][0]["total"] == found[True][0]["again"] and other["total"] is None
