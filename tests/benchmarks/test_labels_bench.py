"""The label benchmark runs, checks the labels, and gives every figure; how fast it is, is no test."""

from __future__ import annotations

import pytest
import torch

from mmkit.bench.labels import make_captions, run
from mmkit.encoders import CaptionLabels


def test_gives_figures_of_both_sides() -> None:
    threads = torch.get_num_threads()
    found = run(repeats=1, captions=60, batch=16, labels=5)
    assert torch.get_num_threads() == threads
    numbers = {key: value for key, value in found.items() if not isinstance(value, str)}
    assert all(value > 0 for value in numbers.values()), numbers
    assert {"speed to sets, mmkit / open_clip", "speed to tensors, mmkit / open_clip", "IDF and collation ms"} <= set(numbers)
    assert "60 captions" in found["conditions"]


def test_captions_are_varied_and_repeatable() -> None:
    labels = CaptionLabels()
    texts = make_captions(300, labels)
    assert texts == make_captions(300, labels) != make_captions(300, labels, seed=1)
    assert len({word for text in texts for word in text.split()}) > 1000
    lengths = sorted(len(labels.tokens(text)) for text in texts)
    assert lengths[15] < 13 and lengths[-15] > 25
    with pytest.raises(AssertionError, match="list of captions"):
        labels.encode(texts[0])
