from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from models.tiny import tokenizer

import mmkit.data.lengths
from mmkit.data.conversations import ConversationEncoder
from mmkit.data.images import ImageRef
from mmkit.data.items import Conversation
from mmkit.data.lengths import conversation_lengths
from mmkit.data.llava_json import read_llava
from mmkit.data.packed import PackedConversations

LIST = [
    Conversation("picture", (ImageRef("a.jpg"),), [("<image>\nWhat is this?", "a red circle.")]),
    Conversation("text", (), [("how many", "three dogs")]),
    Conversation("empty", (), [("how many", " ")]),
    Conversation("two", (ImageRef("a.jpg"), ImageRef("b.jpg")), [("<image> or <image>?", "the big one")]),
    Conversation("lost", (ImageRef("a.jpg"),), [("what " * 2, "a dog on the table near the big red bus"), ("<image>", "a bus")]),
    Conversation("long", (), [("how many", "three dogs " * 60)]),
]
ITEMS = PackedConversations.pack(
    ((item.id, [picture.path for picture in item.images], item.turns, item.system) for item in LIST), Path()
)


def encoder(**more):
    made = tokenizer("sp")
    how = {"tokens_per_image": 7, "image_token_id": made.convert_tokens_to_ids("<image>"), "max_length": 60}
    return ConversationEncoder(made, "demo", **{**how, **more})


def test_lengths_are_those_of_the_encoded_samples():
    encode = encoder()
    found = conversation_lengths(ITEMS, encode)
    good = [encode(item) if item.id != "empty" else None for item in LIST]
    assert found.lengths.tokens.tolist() == [len(e.input_ids) if e else 0 for e in good]
    assert found.supervised.tolist() == [e.num_supervised if e else 0 for e in good]
    assert found.lengths.tokens.dtype == np.int32
    assert found.lengths.tokens.max() <= 60
    assert found.unusable == [(2, "an answer is empty")]
    assert found.cut == 2
    # Of "lost" the turn with the picture does not fit, so what is left has none.
    assert found.lengths.text_only.tolist() == [False, True, True, False, True, True]


def test_the_number_of_processes_changes_nothing(monkeypatch, tmp_path):
    path = tmp_path / "many.json"
    turns = [{"from": "human", "value": "how many"}, {"from": "gpt", "value": "a dog"}]
    path.write_text(json.dumps([{"conversations": [turns[0], {**turns[1], "value": "dog " * (1 + i % 9)}]} for i in range(40)]))
    items, _ = read_llava(path, image_root=tmp_path)
    alone = conversation_lengths(items, encoder(), workers=1)
    monkeypatch.setattr(mmkit.data.lengths, "_PIECE", 7)
    monkeypatch.setattr(mmkit.data.lengths, "_FEW", 10)
    several = conversation_lengths(items, encoder(), workers=2)
    assert np.array_equal(alone.lengths.tokens, several.lengths.tokens)
    assert np.array_equal(alone.supervised, several.supervised)
    assert len(set(alone.lengths.tokens.tolist())) > 4


def test_kept_lengths_are_used_and_a_broken_file_is_made_anew(tmp_path):
    encode = encoder()
    how = {"cache": tmp_path, "fingerprint": ("data", encode.fingerprint())}
    first = conversation_lengths(ITEMS, encode, **how)

    def unused(item):
        raise AssertionError("encoded again")

    again = conversation_lengths(ITEMS, unused, **how)
    assert np.array_equal(again.lengths.tokens, first.lengths.tokens)
    assert np.array_equal(again.lengths.text_only, first.lengths.text_only)
    assert np.array_equal(again.supervised, first.supervised)
    assert (again.cut, again.unusable) == (first.cut, first.unusable)
    (file,) = (tmp_path / "lengths").iterdir()
    whole = file.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"no zip at all", whole[:300] + b"\xff" * 40 + whole[340:]):
        file.write_bytes(broken)
        assert np.array_equal(conversation_lengths(ITEMS, encode, **how).lengths.tokens, first.lengths.tokens)
    with pytest.raises(AssertionError, match="again"):
        conversation_lengths(ITEMS.piece(0, 5), unused, **how)


def test_a_cache_needs_a_fingerprint(tmp_path):
    with pytest.raises(ValueError, match="fingerprint"):
        conversation_lengths(ITEMS, encoder(), cache=tmp_path)


def test_lengths_that_cannot_be_kept_are_counted_all_the_same(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    found = conversation_lengths(ITEMS, encoder(), cache=tmp_path / "file", fingerprint=("x",))
    assert found.lengths.tokens[0] > 0
    assert "cannot be kept" in caplog.text


def test_the_fingerprint_tells_everything_apart_that_changes_a_length():
    same = {encoder().fingerprint() for _ in range(2)}
    assert len(same) == 1
    others = [encoder(max_length=61), encoder(tokens_per_image=8), encoder(image_token_id=5)]
    others.append(ConversationEncoder(tokenizer("sp"), "vicuna_v1", 7, 340, 60))
    others.append(ConversationEncoder(tokenizer("bpe"), "demo", 7, 340, 60))
    assert len({*same, *(other.fingerprint() for other in others)}) == 6
