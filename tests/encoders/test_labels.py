"""Caption labels: id for id equal to open_clip's tokenizer; other vocabularies; bad files."""

from __future__ import annotations

import functools
import io
import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from huggingface_hub import errors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmkit.encoders import CaptionLabels
from mmkit.encoders.stopwords import ENGLISH
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


TROUBLE = st.one_of(
    st.text(max_size=30),
    st.sampled_from(NASTY),
    st.lists(st.sampled_from(["a", "DOG.", "isn't", "x" * 15, "y" * 16, "\u00e9" * 8, "<end_of_text>", "&amp;", "12", ""])).map(
        " ".join
    ),
    st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=40),
)


@given(st.lists(TROUBLE, min_size=24, max_size=60))
@settings(max_examples=60, deadline=None)
def test_a_block_of_any_captions_equals_open_clip(captions: list[str]) -> None:
    captions = [caption.encode("utf-8", "ignore").decode() for caption in captions]
    special = set(reference().all_special_ids)
    labels = CaptionLabels()
    expected = [sorted(set(reference().encode(caption)) - special) for caption in captions]
    assert labels.encode(captions) == expected
    assert [labels.encode_one(caption) for caption in captions] == expected
    ids, offsets = labels.encode_packed(captions)
    assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)] == expected
    assert ids.dtype == offsets.dtype == np.int64


def test_more_captions_than_a_block_holds() -> None:
    labels = CaptionLabels()
    captions = [f"picture {i} of a {'dog' if i % 3 else 'cat'} {i % 7}." if i % 5 else "" for i in range(2500)]
    rows = labels.encode(captions)
    assert rows == [labels.encode_one(caption) for caption in captions]
    ids, offsets = labels.encode_packed(captions)
    assert ids.tolist() == [i for row in rows for i in row]
    assert offsets.tolist() == [0, *itertools.accumulate(map(len, rows))]
    assert labels.encode_packed([])[1].tolist() == [0] and labels.encode([]) == []


@pytest.mark.parametrize("stop_words", [None, "english"])
def test_context_length_of_a_block_is_that_of_single_captions(stop_words: str | None) -> None:
    labels = CaptionLabels(context_length=8, stop_words=stop_words)
    captions = ["the dog, the cat and the bird", "a <end_of_text> dog", "x", "caf\u00e9 " * 9, "0123456789"] * 6
    rows = labels.encode(captions)
    assert rows == [labels.encode_one(caption) for caption in captions]
    if stop_words is None:
        special = set(reference().all_special_ids)
        assert rows == [sorted(set([i for i in reference().encode(c) if i not in special][:6])) for c in captions]


def test_tokens_for_a_text_tower() -> None:
    labels = CaptionLabels(stop_words="english", context_length=5)
    text = "the dog and the dog, isn't it?"
    assert labels.tokens(text) == reference().encode(text)
    assert (labels.start_of_text, labels.end_of_text) == (reference().sot_token_id, reference().eot_token_id)


def test_stop_words_are_whole_words_only() -> None:
    plain, stopped = CaptionLabels(), CaptionLabels(stop_words="english")
    texts = ["The dog is on the other bus", "theater", "the"]
    assert [[plain.decode_tag(i) for i in row] for row in stopped.encode(texts)] == [["dog", "bus"], ["theater"], []]
    assert stopped.describe() == {**plain.describe(), "stop_words": "english"}  # the same sha256: the head's rows are the same
    assert {plain.decode_tag(i) for i in stopped.dropped} == set(ENGLISH)
    piece = next(i for i in range(49408) if plain.token(i) == "the")
    assert piece not in stopped.dropped


def test_stop_words_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "stop.txt"
    file.write_text("# mine\n\nDog\nzebra\nantidisestablishmentarianism\n")
    labels = CaptionLabels(stop_words=str(file))
    assert labels.encode(["a dog and zebra"]) == CaptionLabels().encode(["a and"])
    assert len(labels.dropped) == 2  # the long word is several tokens
    described = labels.describe()
    file.unlink()
    again = CaptionLabels(described["name"], stop_words=described["stop_words"])  # as a saved model is opened
    assert again.dropped == labels.dropped and again.describe() == described


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such list of stop words; use english"),
        (b"# none\n", "no stop words"),
        (b"a\nof the\n", "stop.txt:2: 'of the' is more than a word"),
        (b"\xff", "cannot be read"),
    ],
)
def test_bad_lists_of_stop_words(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "stop.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        CaptionLabels(stop_words=str(file))


def test_stop_words_of_a_vocabulary_with_case_and_a_shared_unknown(tmp_path: Path) -> None:
    vocabulary = {"[UNK]": 0, "The": 1, "the": 2, "bus": 3, "##the": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    labels = CaptionLabels(str(tmp_path), stop_words="english")
    assert labels.dropped == {1, 2}
    assert labels.encode(["The bus", "the busthe and"]) == [[3], [0, 3, 4]]
    assert labels.start_of_text is None and labels.end_of_text is None


def test_labels_travel_to_worker_processes() -> None:
    labels = CaptionLabels(stop_words="english")
    captions = [f"a dog {i}" for i in range(40)]
    rows = labels.encode(captions)
    assert pickle.loads(pickle.dumps(labels)).encode(captions) == rows


def test_tokenizer_of_the_hub(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tokenizer_folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for name in ("bert-base-uncased", "some/bert"):
        labels = CaptionLabels(name)
        assert labels.name == name and labels.file == tokenizer_folder / "tokenizer.json"
        assert labels.encode(["a red bus"]) == CaptionLabels(str(tokenizer_folder)).encode(["a red bus"])
    assert asked == [("bert-base-uncased", "tokenizer.json"), ("some/bert", "tokenizer.json")]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError, "no such vocabulary; use clip.*not in the local cache"),
        (errors.OfflineModeIsEnabled, "no such vocabulary; use clip.*HF_HUB_OFFLINE"),
        (errors.EntryNotFoundError, "has no tokenizer.json; .*SentencePiece"),
        (errors.RemoteEntryNotFoundError, "has no tokenizer.json"),
        (errors.RepositoryNotFoundError, "no such repository on the hub; use clip"),
        (errors.GatedRepoError, "accept its terms; .*hf auth login"),
        (errors.HFValidationError, "no such repository on the hub"),
        (OSError, "cannot be fetched \\(boom\\); check the network"),
    ],
)
def test_hub_errors_say_how_to_mend(error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repository: str, file: str) -> str:
        # Made without their constructors, which want an HTTP response.
        failure = error.__new__(error)
        failure.args = ("boom",)
        raise failure

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(InputError, match=message) as caught:
        CaptionLabels("some/name")
    assert "labels some/name" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing/dir/tokenizer.json", "words.json", "../there", "a/b/c", "spm.model", "/etc/nothing"])
def test_missing_paths_do_not_ask_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(InputError, match="no such vocabulary; use clip"):
        CaptionLabels(name)
