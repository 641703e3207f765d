from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit.data.images import ImageRef
from mmkit.data.items import Conversation, JoinedConversations
from mmkit.data.llava_json import read_llava
from mmkit.errors import InputError

GOOD = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
TEXT = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "images" / "sub" / "a.jpg").write_bytes(b"x")
    (tmp_path / "outside.jpg").write_bytes(b"x")
    return tmp_path / "images"


def write(root, items, name="data.json"):
    path = root.parent / name
    lines = name.endswith(".jsonl")
    path.write_text("".join(json.dumps(i) + "\n" for i in items) if lines else json.dumps(items), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_lists_and_lines_give_the_same(root, name):
    items = [{"id": 7, "image": "sub/a.jpg", "conversations": GOOD}, {"id": "t", "conversations": TEXT}]
    got, left = read_llava(write(root, items, name), image_root=root)
    assert not left
    assert list(got) == [
        Conversation("7", (ImageRef(str(root / "sub" / "a.jpg")),), [("<image>\nWhat?", "A dog.")]),
        Conversation("t", (), [("Hi.", "Hello.")]),
    ]


def turn(question, answer="Fine."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def test_several_pictures_are_a_list_with_a_marker_each(root):
    (root / "b.jpg").write_bytes(b"y")
    pair = {"id": "pair", "image": ["sub/a.jpg", "b.jpg"], "conversations": turn("<image> and <image>?")}
    turns = {"id": "turns", "image": ["b.jpg", "sub/a.jpg"], "conversations": turn("First <image>") + turn("<image>")}
    few = {"id": "few", "image": ["sub/a.jpg", "b.jpg"], "conversations": GOOD}
    many = {"id": "many", "image": ["sub/a.jpg", "b.jpg"], "conversations": turn("<image><image><image>")}
    lost = {"id": "lost", "image": ["sub/a.jpg", "none.jpg"], "conversations": turn("<image><image>")}
    none = {"id": "none", "image": [], "conversations": TEXT}
    got, left = read_llava(write(root, [pair, turns, few, many, lost, none]), image_root=root)
    assert [(item.id, [Path(picture.path).name for picture in item.images]) for item in got] == [
        ("pair", ["a.jpg", "b.jpg"]), ("turns", ["b.jpg", "a.jpg"]), ("none", []),
    ]  # fmt: skip
    assert got[0].turns == [("<image> and <image>?", "Fine.")]
    assert {row.key: row.reason for row in left} == {
        "few": "2 images need as many <image> in the questions, found 1",
        "many": "2 images need as many <image> in the questions, found 3",
        "lost": "no such picture: none.jpg",
    }


def test_a_system_text_comes_first_and_once(root):
    system = {"from": "system", "value": " Be brief. "}
    items = [
        {"id": "s", "conversations": [system, *TEXT]},
        {"id": "blank", "conversations": [{"from": "system", "value": " "}, *TEXT]},
        {"id": "late", "conversations": [*TEXT, system]},
        {"id": "twice", "conversations": [system, system, *TEXT]},
        {"id": "alone", "conversations": [system]},
        {"id": "shown", "conversations": [{"from": "system", "value": "<image>"}, *TEXT]},
    ]
    got, left = read_llava(write(root, items), image_root=root)
    assert [(item.id, item.system) for item in got] == [("s", "Be brief."), ("blank", None)]
    assert got[0].turns == [("Hi.", "Hello.")]
    reasons = {row.key: row.reason for row in left}
    assert "only the first" in reasons["late"]
    assert "message 2 is by system" in reasons["twice"]
    assert "no turns" in reasons["alone"]
    assert "system text" in reasons["shown"]


def test_a_lone_surrogate_becomes_a_question_mark(root):
    path = root.parent / "odd.json"
    path.write_text(json.dumps([{"id": "\ud800", "conversations": turn("a\ud83d", "b\udc00c")}]))
    assert list(read_llava(path, image_root=root)[0]) == [Conversation("?", (), [("a?", "b?c")])]


def test_packed_conversations_are_read_by_number(root):
    got, _ = read_llava(write(root, [{"id": str(i), "conversations": turn(f"q{i}")} for i in range(5)]), image_root=root)
    assert [got[i].id for i in (0, 4, -1)] == ["0", "4", "4"]
    assert [item.id for item in got.piece(0, 2)] == ["0", "1"]
    assert [len(got.piece(0, n)) for n in (0, 9, 5)] == [0, 5, 5]
    part = got.piece(1, 4)
    assert [item.id for item in part] == ["1", "2", "3"]
    assert [item.id for item in part.piece(1, 2)] == ["2"]
    kept = pickle.dumps(part)
    assert [item.id for item in pickle.loads(kept)] == ["1", "2", "3"]
    assert b"q0" not in kept
    assert b"q4" not in kept
    with pytest.raises(IndexError):
        got[5]
    joined = JoinedConversations([(got.piece(0, 2), "a"), (got.piece(0, 0), "b"), (got, "c")])
    assert [joined[i].id for i in range(len(joined))] == ["0", "1", "0", "1", "2", "3", "4"]
    assert [joined.describe(i) for i in (1, 2)] == [("a", "1"), ("c", "0")]
    for first, last in ((0, 7), (1, 3), (2, 2), (3, 6), (6, 7)):
        part = joined.piece(first, last)
        assert [part[i] for i in range(len(part))] == [joined[i] for i in range(first, last)]


def test_the_odd_items_of_the_shared_file(shared):
    broken = shared / "broken"
    got, left = read_llava(broken / "llava_odd_items.json", image_root=broken)
    # The broken picture exists; it is found out when it is decoded.
    assert [item.id for item in got] == [
        "good", "image_last", "image_in_second_turn", "broken_file", "role_words_in_text", "long",
    ]  # fmt: skip
    reasons = {row.key: row.reason for row in left}
    expected = {
        "two_images_one_file": "found 2",
        "token_without_image": "no `image`",
        "image_without_token": "found 0",
        "token_in_answer": "in an answer",
        "gpt_first": "human first",
        "human_last": "no answer",
        "human_twice": "alternate",
        "no_turns": "no turns",
        "unknown_role": "wizard",
        "openai_roles": "OpenAI",
        "empty_answer": "empty",
        "missing_file": "not_there.jpg",
        "good": "used before",
    }
    assert reasons.keys() == expected.keys()
    for key, words in expected.items():
        assert words in reasons[key]
    by_id = {item.id: item for item in got}
    assert [question.count("<image>") for question, _ in by_id["image_last"].turns] == [1]
    assert [question.count("<image>") for question, _ in by_id["image_in_second_turn"].turns] == [0, 1]
    assert len(by_id["long"].turns[0][1]) > 19_000
    assert all(row.source.endswith("llava_odd_items.json") for row in left)


def test_repeated_ids_can_be_kept_as_the_published_files_need(root):
    path = write(root, [{"id": "a", "conversations": TEXT}] * 3)
    assert [item.id for item in read_llava(path, image_root=root, unique_ids=False)[0]] == ["a", "a#2", "a#3"]
    path = write(root, [{"id": "a", "conversations": TEXT}, {"id": "a"}, {"id": "a"}, {"id": "a", "conversations": TEXT}])
    found, left = read_llava(path, image_root=root, unique_ids=False)
    assert ([item.id for item in found], [row.key for row in left]) == (["a", "a#4"], ["a#2", "a#3"])


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("/etc/passwd", "absolute"),
        ("C:\\x.jpg", "absolute"),
        ("../outside.jpg", "climbs"),
        ("sub/../../outside.jpg", "climbs"),
        ("..\\outside.jpg", "climbs"),
        ("sub", "no such picture"),
        ("sub/b.jpg", "no such picture"),
        ("", "no file name"),
        ([["sub/a.jpg"]], "no file name"),
        (3, "no file name"),
        (["/etc/passwd"], "absolute"),
        ("a\0b", "picture|looked up"),
        ("x" * 5000, "picture|looked up"),
    ],
)
def test_image_paths_stay_under_the_root(root, image, words):
    got, left = read_llava(write(root, [{"id": "i", "image": image, "conversations": GOOD}]), image_root=root)
    assert not got
    assert any(word in left[0].reason for word in words.split("|"))


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ([], "no JSON object|not a JSON object"),
        ({"id": "x"}, "conversations"),
        ({"conversations": [{"from": "human", "value": 3}, TEXT[1]]}, "no text"),
        ({"conversations": "hi"}, "no list"),
        ({"conversations": [None]}, "lacks"),
        ({"conversations": [{"from": ["human"], "value": "q"}, TEXT[1]]}, "unknown role"),
        ({"messages": []}, "type: messages"),
    ],
)
def test_malformed_items_are_left_out_with_their_place(root, item, words):
    got, left = read_llava(write(root, [item, {"id": "t", "conversations": TEXT}]), image_root=root)
    assert [i.id for i in got] == ["t"]
    assert any(word in left[0].reason for word in words.split("|"))
    assert left[0].key in ("item 0", "x")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_cut_file_is_refused_with_line_and_column(root, share):
    path = root.parent / "cut.json"
    text = json.dumps([{"id": str(i), "conversations": TEXT} for i in range(5)], indent=1)
    path.write_text(text[: int(len(text) * share)])
    with pytest.raises(InputError, match=r"cut\.json:\d+:\d+: the file looks cut off"):
        read_llava(path, image_root=root)


def test_a_fault_inside_a_file_is_no_cut(root):
    path = root.parent / "bad.json"
    path.write_text('[\n {"id" 3}\n]')
    with pytest.raises(InputError, match=r"bad\.json:2:8: not valid JSON"):
        read_llava(path, image_root=root)


def test_a_bad_line_is_left_out_and_a_cut_last_line_refused(root):
    path = root.parent / "lines.jsonl"
    good = json.dumps({"id": "t", "conversations": TEXT})
    path.write_text(f"\ufeff{good}\n\n{{oops\n{good.replace(chr(34) + 't' + chr(34), chr(34) + 'u' + chr(34))}\r\n")
    got, left = read_llava(path, image_root=root)
    assert [i.id for i in got] == ["t", "u"]
    assert [(row.key, "lines.jsonl:3" in row.reason) for row in left] == [("line 3", True)]
    path.write_text(good + "\n" + good[:20])
    with pytest.raises(InputError, match=r"lines\.jsonl:2:\d+: the file looks cut off"):
        read_llava(path, image_root=root)


def test_missing_empty_and_undecodable_files_are_refused(root):
    with pytest.raises(InputError, match="no such file"):
        read_llava(root / "none.json", image_root=root)
    with pytest.raises(InputError, match="folder"):
        read_llava(root, image_root=root)
    (root / "e.json").write_text(" \n")
    with pytest.raises(InputError, match="empty"):
        read_llava(root / "e.json", image_root=root)
    (root / "u.json").write_bytes(b'[{"id": "\xff"}]')
    with pytest.raises(InputError, match="byte 9"):
        read_llava(root / "u.json", image_root=root)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["human", "gpt", "<image>"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "image", "conversations", "from", "value"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(JSON, max_size=5))
def test_any_json_is_read_or_left_out_never_a_crash(tmp_path_factory, items):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "any.json"
    path.write_text(json.dumps(items), encoding="utf-8")
    got, left = read_llava(path, image_root=folder)
    assert len(got) + len(left) == len(items)
