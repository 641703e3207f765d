"""Conversations in a file that is mapped: the same as in memory, read once, and made anew when anything is wrong with it."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit.data import llava_json, message_rows
from mmkit.data.llava_json import read_llava
from mmkit.data.message_rows import Told, kept_path, look_at_conversations, open_conversations
from mmkit.data.packed import Item, Omission, PackedConversations, write_packed
from mmkit.errors import InputError

TEXT = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]


def shown(*names: str) -> dict[str, object]:
    question = "<image>" * len(names) + "What?"
    return {"image": list(names), "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "A dog. é"}]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Sound and odd items, one line, and pictures of which one is not there."""
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(b"x")
    items = [{"id": "one", **shown("a.jpg")}, {"id": "odd"}, {"id": "lost", **shown("b.jpg", "gone.jpg", "far.jpg")}]
    items += [{"id": "two", **shown("b.jpg", "a.jpg")}, {"id": "text", "conversations": TEXT}, {"id": "up", **shown("../c.jpg")}]
    items += [{"id": "one", **shown("c.jpg")}, {"id": "again", **shown("gone.jpg")}]
    (tmp_path / "data.json").write_text(json.dumps(items))
    return tmp_path / "data.json"


def test_a_kept_file_gives_what_memory_gives(data: Path, tmp_path: Path) -> None:
    items, left_out, fingerprint = open_conversations(str(data))
    kept, left_out_too, same = open_conversations(str(data), cache=tmp_path / "cache")
    assert list(kept) == list(items) and (left_out_too, same) == (left_out, fingerprint)
    assert [item.id for item in kept] == ["one", "two", "text", "one#2"]
    reasons = [(row.key, row.reason.partition(":")[2].strip() or row.reason) for row in left_out]
    # In the order of the file, those of form and those without a picture; of several the first picture is told.
    assert [key for key, _ in reasons] == ["odd", "lost", "up", "again"]
    assert reasons[1][1] == "gone.jpg"
    assert [kept.images(i) for i in range(len(kept))] == [item.images for item in items]
    assert [kept.name(i) for i in range(len(kept))] == ["one", "two", "text", "one#2"]


def test_the_file_is_parsed_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    told = look_at_conversations(str(data), "auto", image_root=None, cache=cache)
    assert told is not None and sorted(told.missing.values()) == ["no such picture: far.jpg", "no such picture: gone.jpg"]

    def never(*arguments: object, **more: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(message_rows, "read_items", never)
    assert len(open_conversations(str(data), cache=cache)[0]) == 4
    # Another process, which is told: it reads neither the file nor the folder of the pictures.
    monkeypatch.setattr(message_rows, "hash_file", never)
    monkeypatch.setattr(llava_json, "_lacks", never)
    items, left_out, fingerprint = open_conversations(str(data), cache=cache, told=told)
    assert (len(items), len(left_out), fingerprint) == (4, 4, told.fingerprint)
    assert len(list((cache / "conversations").iterdir())) == 1


def test_pictures_are_looked_for_at_each_start_and_another_file_is_kept_apart(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert len(open_conversations(str(data), cache=cache)[0]) == 4
    (tmp_path / "gone.jpg").write_bytes(b"x")
    (tmp_path / "a.jpg").unlink()
    items, left_out, _ = open_conversations(str(data), cache=cache)
    assert [item.id for item in items] == ["text", "one#2", "again"]
    assert {row.key: row.reason for row in left_out}["one"] == "no such picture: a.jpg"
    data.write_text(json.dumps([{"id": "new", "conversations": TEXT}]))
    assert [item.id for item in open_conversations(str(data), cache=cache)[0]] == ["new"]
    # The spelling decides what an item is.
    assert not len(open_conversations(str(data), "messages", cache=cache)[0])
    assert len(list((cache / "conversations").iterdir())) == 3


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_file_is_made_anew(damage: bytes | None, data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    fingerprint = open_conversations(str(data), cache=cache)[2]
    kept = kept_path(cache, fingerprint, "auto")
    whole = kept.read_bytes()
    other = tmp_path / "other"
    path = kept_path(other, fingerprint, "auto")
    path.parent.mkdir(parents=True)
    path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert len(open_conversations(str(data), cache=other)[0]) == 4
    assert path.read_bytes() == whole


def test_a_machine_without_the_kept_file_reads_its_own(data: Path, tmp_path: Path) -> None:
    told = look_at_conversations(str(data), "auto", image_root=None, cache=tmp_path / "cache")
    assert told is not None
    items, left_out, fingerprint = open_conversations(str(data), cache=tmp_path / "local", told=told)
    assert (len(items), len(left_out), fingerprint) == (4, 4, told.fingerprint)
    # Another file under the same name: its own fingerprint, by which the run is refused, and its own pictures.
    away = Told("0" * 32, dict.fromkeys(range(9), "no"))
    assert open_conversations(str(data), cache=tmp_path / "local", told=away)[2] == fingerprint
    assert len(open_conversations(str(data), cache=tmp_path / "local", told=away)[0]) == 4


def test_a_cache_that_is_a_file_costs_memory_and_is_said(data: Path, tmp_path: Path, caplog) -> None:
    (tmp_path / "cache").write_text("")
    with caplog.at_level(logging.WARNING):
        items, *_ = open_conversations(str(data), cache=tmp_path / "cache")
    assert len(items) == 4 and "each process reads them into its memory" in caplog.text


def test_a_broken_file_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('[{"id": "a", "conversations": [')
    for words in ("cut.json", "none.json"):
        with pytest.raises(InputError, match=words):
            open_conversations(str(tmp_path / words), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.*"))


def test_pieces_travel_by_name_where_the_file_is_mapped(data: Path, tmp_path: Path) -> None:
    items, *_ = open_conversations(str(data), cache=tmp_path / "cache")
    for made in (items, items.piece(1, 3)):
        sent = pickle.dumps(made)
        assert b"A dog" not in sent and list(pickle.loads(sent)) == list(made)
    memory = open_conversations(str(data))[0].piece(1, 3)
    assert list(pickle.loads(pickle.dumps(memory))) == list(items.piece(1, 3)) == list(memory)


def test_a_file_that_is_gone_is_told(data: Path, tmp_path: Path) -> None:
    from mmkit.data import packed

    items, _, fingerprint = open_conversations(str(data), cache=tmp_path / "cache")
    sent = pickle.dumps(items)
    kept_path(tmp_path / "cache", fingerprint, "auto").unlink()
    # Those that have it mapped go on.
    assert len(list(items)) == 4
    packed._map.cache_clear()
    with pytest.raises(InputError, match="leave the cache alone while a run reads it"):
        pickle.loads(sent)


def test_a_list_in_one_long_line(tmp_path: Path) -> None:
    item = {"id": "x", "conversations": [TEXT[0], {"from": "gpt", "value": "a" * 3000}]}
    (tmp_path / "long.json").write_text(" " * 70_000 + json.dumps([item] * 6000))
    found, left_out = read_llava(tmp_path / "long.json", image_root=tmp_path, unique_ids=False)
    assert (len(found), left_out) == (6000, [])


def test_a_line_without_end_is_left_out(tmp_path: Path) -> None:
    row = json.dumps({"id": "t", "conversations": TEXT})
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{row}\n{{"id": "{"x" * (17 << 20)}"}}\n{row.replace(chr(34) + "t", chr(34) + "u")}\n')
    found, left_out = read_llava(path, image_root=tmp_path)
    assert [item.id for item in found] == ["t", "u"]
    assert [(row.key, row.reason) for row in left_out] == [("line 2", "rows.jsonl:2: a line of more than 16 MiB")]


_names = st.text(min_size=1, max_size=6)
_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_items = st.builds(
    Item,
    number=st.integers(0, 10**9),
    key=_texts,
    names=st.lists(_names, max_size=3),
    turns=st.lists(st.tuples(_texts, _texts), min_size=1, max_size=3),
    system=st.none() | _texts,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(_items | st.builds(Omission, st.integers(0, 10**9), _names, _names), max_size=8), st.data())
def test_any_items_come_back(
    tmp_path_factory: pytest.TempPathFactory, items: list[Item | Omission], drawn: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("packed") / "x.bin"
    with path.open("wb") as file:
        write_packed(file, items)
    found = PackedConversations.open(path, Path("r"))
    assert found is not None
    sound = [item for item in items if isinstance(item, Item)]
    assert found.left_out == [item for item in items if isinstance(item, Omission)]
    assert [(item.id, item.turns, item.system) for item in found] == [(i.key, i.turns, i.system) for i in sound]
    assert [[picture.path for picture in item.images] for item in found] == [[str(Path("r") / n) for n in i.names] for i in sound]
    names = list(found.names())
    assert names == list(dict.fromkeys(name for item in sound for name in item.names))
    bad = dict.fromkeys(drawn.draw(st.sets(st.sampled_from(range(len(names))))), "gone") if names else {}
    kept, without = found.without(bad)
    lost = [item for item in sound if any(names.index(name) in bad for name in item.names)]
    assert [item.id for item in kept] == [item.key for item in sound if item not in lost]
    assert [(row.number, row.key) for row in without] == [(item.number, item.key) for item in lost]
