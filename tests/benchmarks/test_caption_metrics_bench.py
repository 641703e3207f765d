"""The caption benchmark runs, compares the scores, and gives every figure; how fast it is, is no test."""

from __future__ import annotations

import importlib.util
import shutil
import statistics

import pytest

from mmkit.bench import run_bench
from mmkit.bench.caption_metrics import make_set, score_mmkit
from mmkit.errors import InputError

PEER = shutil.which("java") is not None and importlib.util.find_spec("pycocoevalcap") is not None


@pytest.mark.skipif(not PEER, reason="needs a Java runtime and pycocoevalcap (pip install mmkit[java])")
def test_gives_figures_of_both_sides(capfd: pytest.CaptureFixture[str]) -> None:
    found = run_bench("caption-metrics", {"repeats": "1", "images": "30", "references": "2", "large": "20"})
    numbers = {key: value for key, value in found.items() if not isinstance(value, str)}
    assert all(value > 0 for value in numbers.values()), numbers
    assert {"speed, mmkit / pycocoevalcap", "large set, s", "large set, peak MiB"} <= set(numbers)
    assert "30 images x 2 references" in found["conditions"]
    # The peer's Java talks about itself; a benchmark's output is its table.
    assert capfd.readouterr().err == ""
    assert "large set" not in run_bench("caption-metrics", {"repeats": "1", "images": "5", "large": "0"})


def test_peer_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="the peer is pycocoevalcap with Java"):
        run_bench("caption-metrics")


def test_captions_are_like_cocos() -> None:
    hypotheses, references = make_set(300, 5)
    assert (hypotheses, references) == make_set(300, 5)
    assert hypotheses != make_set(300, 5, seed=1)[0]
    captions = [*hypotheses, *(caption for group in references for caption in group)]
    assert len(captions) == 1800
    assert 10 < statistics.mean(len(caption.split()) for caption in captions) < 13
    assert len({word.strip(".,").lower() for caption in captions for word in caption.split()}) > 1000
    # Captions of one image have something in common, or nothing would be counted.
    assert score_mmkit(hypotheses, references, "python")[-1] > 0.1
