"""What `mmkit data inspect` counts, against plain Python, and the files it writes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from mmkit.data.inspect import Inspection, inspect_pairs
from mmkit.encoders import CaptionLabels, OnlineIDF, pack_labels
from mmkit.encoders.idf import load_table
from mmkit.errors import InputError

CAPTIONS = [
    "A red bus and the red car.",
    "the",
    "two dogs, a bus",
    "caf\u00e9 bus",
    "<end_of_text>",
    *(f"dog number {i}" for i in range(60)),
]


def inspect_captions(location: str, **more: Any) -> Inspection:
    return inspect_pairs(location, pictures=False, workers=1, **more)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """A JSON-lines data set with three bad rows; pictures are not looked at."""
    rows = [json.dumps({"image": f"{i}.jpg", "caption": caption}) for i, caption in enumerate(CAPTIONS)]
    rows += ['{"image": "/a.jpg", "caption": "x"}', '{"image": "../b.jpg", "caption": "x"}', '{"image": "c.jpg", "caption": ""}']
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    return str(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize("stop_words", [None, "english"])
def test_counts_equal_plain_python(pairs: str, stop_words: str | None) -> None:
    labels = CaptionLabels(stop_words=stop_words)
    rows = [labels.encode_one(caption) for caption in CAPTIONS]
    documents = Counter(label for row in rows for label in row)
    found = inspect_captions(pairs, stop_words=stop_words)
    assert (found.pairs, found.vocab_size) == (65, 49408)
    assert found.left_out == {"image ... points outside the data folder": 2, "caption is empty": 1}
    assert found.unlabelled == sum(not row for row in rows) == (1 if stop_words is None else 2)
    lengths = sorted(map(len, rows))
    assert (found.lengths[0.0], found.lengths[0.5], found.lengths[1.0]) == (lengths[0], lengths[32], lengths[-1])
    assert found.distinct == len(documents)
    assert [count for _, count in found.top] == sorted(documents.values(), reverse=True)[: len(found.top)]
    assert dict(found.top)["dog"] == 60
    assert ("the" in dict(found.top)) == (stop_words is None)


def test_limits(pairs: str) -> None:
    found = inspect_captions(pairs, limit=2, context_length=4)
    assert (found.pairs, found.lengths[1.0]) == (2, 2)
    with pytest.raises(InputError, match="limit 0 leaves no pair"):
        inspect_captions(pairs, limit=0)


def test_the_table_equals_an_epoch_of_online_counts(pairs: str, tmp_path: Path) -> None:
    labels, online = CaptionLabels(), OnlineIDF(49408)
    online.update(*pack_labels(labels.encode(CAPTIONS)))
    for stop_words in (None, "english"):  # one table for runs with and without stop words
        file = tmp_path / f"idf-{stop_words}.safetensors"
        found = inspect_captions(pairs, idf=file, stop_words=stop_words)
        df, n = load_table(file, sha256=labels.describe()["sha256"], vocab_size=49408)
        assert torch.equal(df, online.df) and n == int(online.n) == 64
        assert torch.equal(OnlineIDF(49408, df, n, frozen=True).weights(), online.weights())
        assert found.written == [f"wrote {file}: document counts of 64 captions (data.idf=file data.idf_file={file})"]


def test_words_file_becomes_a_vocabulary(pairs: str, tmp_path: Path) -> None:
    file = tmp_path / "words.json"
    found = inspect_captions(pairs, words=file, min_count=2, words_size=3, stop_words="english")
    assert found.written[0].startswith(f"wrote {file}: 3 of ")
    labels = CaptionLabels(str(file))
    assert [labels.token(i) for i in range(3)] == ["dog", "number", "bus"]
    idf = tmp_path / "idf.safetensors"
    again = inspect_captions(pairs, labels=str(file), idf=idf)
    assert (again.distinct, again.unlabelled) == (3, 2)
    assert load_table(idf, sha256=labels.describe()["sha256"], vocab_size=3)[0].tolist() == [60, 60, 3]
    with pytest.raises(InputError, match="counts the vocabulary"):
        load_table(idf, sha256=CaptionLabels().describe()["sha256"], vocab_size=49408)


def test_lines_for_people(pairs: str, tmp_path: Path) -> None:
    lines = inspect_captions(pairs, idf=tmp_path / "idf.safetensors").lines()
    text = "\n".join(lines)
    assert "pairs: 65" in lines and "left out: 3" in lines and "captions without a label: 1" in lines
    assert "  2 x image ... points outside the data folder" in lines
    assert "dog 92.3%" in text and "median 4" in text and lines[-1].startswith("wrote ")


def test_real_captions(shared: Path) -> None:
    found = inspect_captions(str(shared / "coco-mini" / "captions_train.json"))
    assert found.pairs > 300 and found.unlabelled == 0 and found.top[0][0] in {"a", "."}
