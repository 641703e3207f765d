"""Word-level vocabularies: counted from a corpus, written, opened, and refused when broken."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmkit.encoders import CaptionLabels
from mmkit.encoders.words import count_words, split_words, write_words
from mmkit.errors import InputError

CORPUS = [
    "A red bus, a RED car.",
    "the bus-stop &amp; 2 dogs",
    "",
    "dogs! dogs? caf\u00e9",
    "\u0939\u093f\u0928\u094d\u0926\u0940 bus_a",
]


def test_words_are_runs_of_letters_and_numbers() -> None:
    assert split_words("Don't   STOP: caf\u00e9 cafe\u0301 3rd_4 &lt;") == [
        "don",
        "t",
        "stop",
        "caf\u00e9",
        "caf\u00e9",
        "3rd",
        "4",
    ]
    assert split_words(CORPUS[4]) == ["\u0939\u093f\u0928\u094d\u0926\u0940", "bus", "a"]


def test_document_frequencies() -> None:
    assert count_words(CORPUS) == Counter(
        a=2, red=1, bus=3, car=1, the=1, stop=1, dogs=2, **{"2": 1, "caf\u00e9": 1, "\u0939\u093f\u0928\u094d\u0926\u0940": 1}
    )


def test_write_and_open(tmp_path: Path) -> None:
    file = tmp_path / "words.json"
    assert write_words(file, count_words(CORPUS), size=4, min_count=1, captions=5, stop_words=["a"]) == 4
    content = json.loads(file.read_text())
    assert content == {"kind": "mmkit-words", "words": ["bus", "dogs", "2", "caf\u00e9"], "counts": [3, 2, 1, 1], "captions": 5}
    labels = CaptionLabels(str(file))
    assert labels.vocab_size == 4 and labels.describe()["kind"] == "mmkit-words"
    texts = ["A caf\u00e9, dogs & a BUS-caf\u00e9", "unknown words", "", "2 BUS"] * 10
    assert labels.encode(texts) == [[0, 1, 3], [], [], [0, 2]] * 10  # arrays
    assert labels.encode(texts[:4]) == [[0, 1, 3], [], [], [0, 2]]  # loop
    assert labels.tokens("2 cars, CAF\u00c9 2") == [2, 3, 2]
    assert labels.token(1) == labels.decode_tag(1) == "dogs"


def test_least_count_and_stop_labels(tmp_path: Path) -> None:
    file = tmp_path / "words.json"
    assert write_words(file, count_words(CORPUS), min_count=2, captions=5) == 3
    labels = CaptionLabels(str(file), stop_words="english")
    assert labels.encode(["a bus with dogs"]) == [[0, 2]]  # bus, a, dogs
    assert labels.dropped == {1}
    with pytest.raises(InputError, match="no word is in 9 or more of 5 captions; lower min_count"):
        write_words(tmp_path / "none.json", count_words(CORPUS), min_count=9, captions=5)
    assert not (tmp_path / "none.json").exists()


GOOD: dict[str, Any] = {"kind": "mmkit-words", "words": ["a", "b"], "counts": [2, 1], "captions": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": []}, "words must be a list"),
        ({"words": ["a", 1]}, "words must be a list"),
        ({"words": ["a", "a"]}, "the word 'a' comes twice"),
        ({"counts": [1]}, "counts must be 2 whole numbers"),
        ({"counts": [1, 1.5]}, "counts must be 2 whole numbers"),
        ({"captions": None}, "captions must be a whole number"),
        ({"kind": "other"}, "no tokenizer"),
    ],
)
def test_broken_words_files_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "words.json"
    file.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(InputError, match=message) as caught:
        CaptionLabels(str(file))
    assert str(file) in str(caught.value)
