from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models.tiny import tokenizer
from PIL import Image

from mmkit.data.conversations import ConversationEncoder
from mmkit.data.images import ImageRef
from mmkit.data.items import Conversation, JoinedConversations, OddItem, arrange
from mmkit.data.lengths import conversation_lengths
from mmkit.data.message_rows import open_conversations
from mmkit.data.messages import parse_item
from mmkit.data.skipped import SampleError
from mmkit.errors import InputError

ASKED, SAID = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}
TEXT, PICTURE = {"type": "text", "text": "What?"}, {"type": "image"}


def png(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "pictures" / name).write_bytes(png(len(name)))
    (tmp_path / "outside.png").write_bytes(png(9))
    return tmp_path / "pictures"


def lines(root, items, name="rows.jsonl"):
    path = root.parent / name
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def asked(*content, **more):
    return {"messages": [{"role": "user", "content": list(content)}, SAID], **more}


def test_rows_of_messages_are_read_as_conversations(root):
    items = [
        {"id": "text", "messages": [{"role": "system", "content": " Be brief. "}, ASKED, SAID]},
        {"id": "string", "messages": [{"role": "user", "content": "<image>\nWhat?"}, SAID], "images": ["a.png"]},
        {"id": "parts", **asked(PICTURE, TEXT, PICTURE, images=["b.png", "a.png"])},
        {"id": "own", **asked({"type": "image", "image": "a.png"}, TEXT)},
        {"id": "path", **asked(TEXT, {"type": "image", "path": "b.png"})},
        {"id": "one", **asked(TEXT, PICTURE, image="b.png")},
    ]
    found, left, _ = open_conversations(lines(root, items), image_root=str(root))
    assert not left
    a, b = (ImageRef(str(root / name)) for name in ("a.png", "b.png"))
    assert [found[i] for i in range(len(found))] == [
        Conversation("text", (), [("What?", "A dog.")], "Be brief."),
        Conversation("string", (a,), [("<image>\nWhat?", "A dog.")]),
        Conversation("parts", (b, a), [("<image>\nWhat?<image>\n", "A dog.")]),
        Conversation("own", (a,), [("<image>\nWhat?", "A dog.")]),
        Conversation("path", (b,), [("What?<image>\n", "A dog.")]),
        Conversation("one", (b,), [("What?<image>\n", "A dog.")]),
    ]


BAD = {
    "several": ({"messages": [ASKED, {"role": "user", "content": "x"}, SAID]}, "message 2 is by user"),
    "first": ({"messages": [SAID, ASKED]}, "message 1 is by assistant: user and assistant must alternate, user first"),
    "open": ({"messages": [ASKED, SAID, ASKED]}, "the last message is by user: no answer to learn"),
    "blank": ({"messages": [ASKED, {"role": "assistant", "content": " \n"}]}, "message 2: the answer is empty"),
    "none": ({"messages": [ASKED, {"role": "assistant", "content": None}]}, "message 2: `content` is NoneType"),
    "number": ({"messages": [{"role": "user", "content": 3}, SAID]}, "message 1: `content` is int"),
    "tool": ({"messages": [ASKED, {"role": "tool", "content": "x"}, SAID]}, "unknown role 'tool'"),
    "listed": ({"messages": [{"role": ["user"], "content": "x"}, SAID]}, r"unknown role \['user'\]"),
    "calls": ({"messages": [ASKED, {**SAID, "tool_calls": [{}]}]}, "tool calls"),
    "video": (asked({"type": "video"}), "a part of type 'video'"),
    "textless": (asked({"type": "text"}), "a text part without `text`"),
    "text": ({"messages": "hi"}, "`messages` is missing or no list"),
    "empty": ({"messages": []}, "no turns"),
    "llava": ({"messages": [{"from": "human", "value": "x"}]}, "LLaVA's from/value"),
    "unnamed": (asked(PICTURE, TEXT), "<image> in the text but no `image`"),
    "few": (asked(PICTURE, PICTURE, images=["a.png"]), "one image needs one <image> in the questions, found 2"),
    "both": (asked({"type": "image", "image": "a.png"}, images=["a.png"]), "both in the messages and beside"),
    "half": (asked({"type": "image", "image": "a.png"}, PICTURE), "1 of 2 picture parts"),
    "outside": (asked(PICTURE, images=["../outside.png"]), "climbs out"),
    "absolute": (asked({"type": "image", "path": "/etc/passwd"}), "absolute"),
    "gone": (asked(PICTURE, images=["c.png"]), "no such picture: c.png"),
    "answer": ({"messages": [ASKED, {**SAID, "content": [PICTURE, TEXT]}]}, "<image> in an answer"),
}


def test_what_cannot_be_used_is_left_out_with_its_reason(root):
    items = [{"id": name, **item} for name, (item, _) in BAD.items()]
    found, left, _ = open_conversations(lines(root, items), "messages", image_root=str(root))
    assert len(found) == 0
    assert [row.key for row in left] == list(BAD)
    for row, (_, words) in zip(left, BAD.values(), strict=True):
        with pytest.raises(OddItem, match=words):
            raise OddItem(row.reason)


def test_the_spelling_is_found_row_by_row_or_demanded(root):
    llava = {"id": "l", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    path = lines(root, [llava, {"id": "m", "messages": [ASKED, SAID]}])
    assert [len(open_conversations(path, kind)[0]) for kind in ("auto", "llava", "messages")] == [2, 1, 1]
    assert "type: messages" in open_conversations(path, "llava")[1][0].reason
    with pytest.raises(InputError, match="use llava or messages"):
        open_conversations(path, "coco")
    with pytest.raises(InputError, match="from a disk"):
        open_conversations("s3://bucket/rows.jsonl")


def test_answers_by_turn_are_paired():
    messages, _ = parse_item({"messages": [ASKED, SAID, {"role": "user", "content": "And?"}, SAID]})
    assert arrange(messages) == ([("What?", "A dog."), ("And?", "A dog.")], None)


def hub_rows(root, names=("a.png", "b.png")):
    pictures = [{"bytes": (root / name).read_bytes(), "path": name} for name in names]
    rows = [
        {"id": "two", "messages": [{"role": "user", "content": "<image> or <image>?"}, SAID], "images": pictures},
        {"id": "text", "messages": [ASKED, SAID], "images": []},
        {"id": "bad", "messages": [ASKED, {"role": "assistant", "content": ""}], "images": []},
        {"id": "few", "messages": [{"role": "user", "content": "What?"}, SAID], "images": pictures[:1]},
    ]
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "images": datasets.List(datasets.Image()),
        }
    )
    return datasets.Dataset.from_list(rows, features=features)


@pytest.fixture(params=["saved", "parquet", "folder"])
def stored(request, root, monkeypatch):
    """A data set in the three ways in which it may lie on a disk."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(root.parent / "cache"))
    made, folder = hub_rows(root), root.parent / "stored"
    if request.param == "saved":
        made.save_to_disk(str(folder))
        return f"hf:{folder}"
    folder.mkdir()
    made.to_parquet(str(folder / "train-00000.parquet"))
    return str(folder / "train-00000.parquet") if request.param == "parquet" else f"hf:{folder}@train"


def test_rows_with_picture_bytes_are_read_by_number(stored, root):
    found, left, fingerprint = open_conversations(stored)
    assert (len(found), left) == (4, [])
    assert fingerprint == open_conversations(stored)[2]
    item = found[0]
    assert (item.id, item.turns, item.system) == ("two", [("<image> or <image>?", "A dog.")], None)
    assert [picture.read() for picture in item.images] == [(root / name).read_bytes() for name in ("a.png", "b.png")]
    with pytest.raises(SampleError, match="bytes"):
        item.images[0].read(10)
    assert found[1].images == ()
    with pytest.raises(SampleError, match="message 2: the answer is empty"):
        found[2]
    with pytest.raises(SampleError, match="one image needs one <image>"):
        found[3]
    joined = JoinedConversations([(found.piece(0, 1), "x"), (found, stored)])
    assert len(joined) == 5
    assert joined.describe(3) == (stored, "row 2")
    assert joined[1].id == "two"
    assert pickle.loads(pickle.dumps(found.piece(1, 9)))[0] == found[1]
    assert found.piece(1, 4).piece(1, 2).name(0) == "row 2"


def test_lengths_of_rows_name_the_unusable(stored):
    found, *_ = open_conversations(stored)
    made = tokenizer("sp")
    encode = ConversationEncoder(made, "demo", 4, made.convert_tokens_to_ids("<image>"), 200)
    measured = conversation_lengths(found, encode)
    assert [number for number, _ in measured.unusable] == [2, 3]
    assert measured.lengths.text_only.tolist()[:2] == [False, True]
    assert measured.lengths.tokens.tolist()[0] == len(encode(found[0]).input_ids)


def saved(root, rows, name="named"):
    folder = root.parent / name
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    return f"hf:{folder}"


def test_rows_that_name_files_stay_under_the_root(root):
    def row(name, **more):
        return {"messages": [{"role": "user", "content": "<image>\nWhat?"}, SAID], "images": [name], **more}

    place = saved(root, [row(name) for name in ("a.png", "../outside.png", "/etc/passwd", "none.png")])
    found, *_ = open_conversations(place, image_root=str(root))
    assert found[0].images == (ImageRef(str(root / "a.png")),)
    assert found[0].id == "row 0"
    for number, words in ((1, "climbs"), (2, "absolute"), (3, "no such picture")):
        with pytest.raises(SampleError, match=words):
            found[number]
    outside = {"bytes": None, "path": str(root.parent / "outside.png")}
    inside = {"bytes": None, "path": str(root / "a.png")}
    place = saved(root, [row(outside), row(inside)], "linked")
    found, *_ = open_conversations(place, image_root=str(root))
    assert found[1].images[0].read() == (root / "a.png").read_bytes()
    with pytest.raises(SampleError, match="outside the data folder"):
        found[0].images[0].read()


def test_rows_in_llavas_spelling_with_one_picture(root):
    talk = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    rows = [{"conversations": talk, "image": (root / "a.png").read_bytes()}, {"conversations": talk, "image": None}]
    found, *_ = open_conversations(saved(root, rows))
    assert found[0].images[0].read() == (root / "a.png").read_bytes()
    with pytest.raises(SampleError, match="no `image`"):
        found[1]
    with pytest.raises(InputError, match="no column 'messages' of messages; there are conversations, image"):
        open_conversations(saved(root, rows), "messages")


def test_null_keys_of_a_table_are_no_keys(root):
    rows = [asked({"type": "image", "text": None, "image": "a.png"}, {"type": "text", "text": "What?", "image": None})]
    rows[0]["messages"][1] = {"role": "assistant", "content": [{"type": "text", "text": "A dog.", "image": None}]}
    found, *_ = open_conversations(saved(root, rows), image_root=str(root))
    assert found[0] == Conversation("row 0", (ImageRef(str(root / "a.png")),), [("<image>\nWhat?", "A dog.")])


def test_places_that_cannot_be_opened_are_refused(root):
    with pytest.raises(InputError, match="no name after hf:"):
        open_conversations("hf:")
    with pytest.raises(InputError, match="cannot be loaded"):
        open_conversations(f"hf:{root.parent / 'nothing'}")
    broken = root.parent / "x.parquet"
    broken.write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        open_conversations(str(broken))
    with pytest.raises(InputError, match="no such file"):
        open_conversations(str(root.parent / "none.jsonl"))
    hub_rows(root).select([]).to_parquet(str(root.parent / "empty.parquet"))
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        open_conversations(str(root.parent / "empty.parquet"))
    (root.parent / "empty.json").write_text(" [ ]\n")
    with pytest.raises(InputError, match="holds no conversations"):
        open_conversations(str(root.parent / "empty.json"))


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=6) | st.sampled_from(["user", "assistant", "image", "text", "<image>", "a.png"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["messages", "images", "role", "content", "type", "text", "image"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_any_row_is_read_or_left_out_never_a_crash(row):
    item = row if isinstance(row, dict) else {"messages": row}
    try:
        messages, pictures = parse_item(item)
        turns, _ = arrange(messages)
    except OddItem as odd:
        assert str(odd)
        return
    assert all(answer.strip() for _, answer in turns)
    assert isinstance(pictures, list)


def test_a_picture_is_equal_to_the_same_place_only(root, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(root.parent / "cache"))
    hub_rows(root).save_to_disk(str(root.parent / "stored"))
    found, *_ = open_conversations(f"hf:{root.parent / 'stored'}")
    again, *_ = open_conversations(f"hf:{root.parent / 'stored'}")
    assert found[0].images == again[0].images
    assert len({*found[0].images, *again[0].images}) == 2
    assert np.asarray(Image.open(io.BytesIO(found[0].images[0].read()))).shape == (8, 8, 3)
    assert Path(found[0].images[0].path.removeprefix("hf:")).is_dir()
