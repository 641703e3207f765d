"""Caption labels: id for id equal to open_clip's tokenizer; other vocabularies; bad files."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmkit.encoders import CaptionLabels
from mmkit.encoders.vocab import ClipVocabulary, clean_lower
from mmkit.errors import InputError

NASTY = [
    "Hello world!",
    "",
    " \t\n ",
    "A red  bus\t\n isn't 'S we'LL I'd THEY'VE",
    "'\u017f \u017ftart <start_of_text> <END_OF_TEXT> <\u017ftart_of_text> a<start_of_text>b",
    "1234 \u00bd \u2167 \u00b2 \u0663 3.14 2nd",
    "&amp;amp; &lt;b&gt; &#xD800; &nbsp;x &notit; & &amp",
    "caf\u00e9 cafe\u0301 \ufb01ne \uff21\uff22 \u200b\ufeff",
    "\ud83d\ude00 \U0001f600\U0001f3fd\u200d\U0001f680 \u2764\ufe0f",
    "sch\u00c3\u00b6n \u00e2\u20ac\u0153quote\u00e2\u20ac\x9d \u0130stanbul \u212a \u212b STRASSE \u1e9e",
    "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22 \u0627\u0644",
    "\x00\x1b[0m \x85 \xa0 \u2028 \u2029 \u3000 x \x7f",
    "x" * 300,
    "!!! ... --- ### \u2026 \u201cquoted\u201d o'clock rock'n'roll",
    "line one\r\nline two\rline three\x0b\x0c",
]


@functools.cache
def reference() -> Any:
    """open_clip's pure Python tokenizer."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def same_as_reference(text: str) -> None:
    special = set(reference().all_special_ids)
    assert ClipVocabulary.encode(vocabulary(), text) == [i for i in reference().encode(text) if i not in special]


@functools.cache
def vocabulary() -> ClipVocabulary:
    return ClipVocabulary()


@pytest.mark.parametrize("text", NASTY)
def test_nasty_text_equals_open_clip(text: str) -> None:
    same_as_reference(text)


@given(st.text(max_size=60))
@example("a&amp;b")
@settings(max_examples=300, deadline=None)
def test_any_text_equals_open_clip(text: str) -> None:
    # Lone surrogates cannot come out of a UTF-8 file.
    same_as_reference(text.encode("utf-8", "ignore").decode())


@given(st.text(st.characters(max_codepoint=0x7F), max_size=80))
@settings(max_examples=300, deadline=None)
def test_ascii_fast_path_changes_nothing(text: str) -> None:
    same_as_reference(text)


def test_whole_vocabulary_is_open_clips() -> None:
    labels = CaptionLabels("clip")
    decoder = reference().decoder
    assert labels.vocab_size == 49408
    assert [labels.token(i) for i in range(49408)] == [decoder[i] for i in range(49408)]


def test_labels_are_sorted_sets() -> None:
    labels = CaptionLabels()
    (ids, empty, special) = labels.encode(["the dog and the dog", "", "<start_of_text> <end_of_text>"])
    assert ids == sorted(set(ids)) and len(ids) == 3
    assert empty == [] and special == []
    assert {labels.decode_tag(i) for i in ids} == {"the", "dog", "and"}


def test_word_pieces_and_ends_differ() -> None:
    labels = CaptionLabels()
    assert labels.token(256) == "!</w>" and labels.decode_tag(256) == "!"
    assert labels.decode_tag(0) == "!-"
    assert labels.decode_tag(49406) == "<start_of_text>"
    cafe = labels.encode(["caf\u00e9"])[0]
    assert any("\u00e9" in labels.decode_tag(i) for i in cafe)


def test_context_length_keeps_what_the_reference_keeps() -> None:
    text = " ".join(f"word{i}" for i in range(60))
    row = reference()([text], context_length=77)[0].tolist()
    assert CaptionLabels(context_length=77).encode([text])[0] == sorted(set(row[1:76]))
    assert len(CaptionLabels(context_length=3).encode([text])[0]) == 1
    with pytest.raises(InputError, match="leaves no label"):
        CaptionLabels(context_length=2)


def test_a_caption_instead_of_a_list_is_refused() -> None:
    with pytest.raises(AssertionError, match="list of captions"):
        CaptionLabels().encode("a red bus")


def test_clean_lower() -> None:
    assert clean_lower("  A &amp;amp; B\u00a0C ") == "a & b c"


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """A WordPiece tokenizer with special tokens, truncation and padding switched on."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordPieceTrainer(special_tokens=["[UNK]", "[CLS]"], vocab_size=60)
    tokenizer.train_from_iterator(["a red bus", "a blue bus", "the busy reds"], trainer)
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_hugging_face_tokenizer_folder(tokenizer_folder: Path) -> None:
    labels = CaptionLabels(str(tokenizer_folder))
    ids, special = labels.encode(["a red bus", "[CLS]"])
    assert len(ids) == 3 and special == []
    assert {labels.decode_tag(i) for i in ids} == {"a", "red", "bus"}
    assert labels.describe()["kind"] == "tokenizer.json"
    assert labels.encode(["a red bus"]) == CaptionLabels(str(tokenizer_folder / "tokenizer.json")).encode(["a red bus"])
    pieces = [labels.token(i) for i in range(labels.vocab_size)]
    assert labels.decode_tag(next(i for i, piece in enumerate(pieces) if piece.startswith("##"))).startswith("-")


def test_sentencepiece_model(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red bus", "a blue bus", "the busy reds"] * 20),
        model_writer=model,
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "spm.model").write_bytes(model.getvalue())
    labels = CaptionLabels(str(tmp_path))
    (ids,) = labels.encode(["a red bus \u65e5"])
    assert ids and ids == sorted(set(ids)) and min(ids) > 2  # 0-2 are unknown, start and end
    assert labels.describe()["kind"] == "sentencepiece"
    assert all(labels.decode_tag(i) for i in ids)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "not readable JSON"),
        ("tokenizer.json", "[]", "no tokenizer"),
        ("spm.model", "nonsense", "not a SentencePiece model"),
        ("readme.txt", "", "no tokenizer.json or .model"),
    ],
)
def test_bad_vocabulary_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        CaptionLabels(str(tmp_path))


def test_unknown_vocabulary() -> None:
    with pytest.raises(InputError, match="no such vocabulary; use clip"):
        CaptionLabels("clap")
