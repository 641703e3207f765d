"""Labelled sets: the four kinds hold the same pictures, and every fault is named with its place."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmkit.config import LabelledDataConfig
from mmkit.data.labelled import is_number, open_labelled, sort_classes
from mmkit.data.skipped import SampleError
from mmkit.errors import InputError

CLASSES = ("black", "red", "white")


def data(**more: object) -> LabelledDataConfig:
    return LabelledDataConfig(**{"test": "unused", **more})  # type: ignore[arg-type]


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 10, 0, 0)).save(out, "png")
    return out.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def four(tmp_path: Path) -> dict[str, tuple[str, LabelledDataConfig]]:
    """The same nine pictures as folder, rows, shards and Hugging Face data set."""
    pictures = [(name, 3 * c + i) for c, name in enumerate(CLASSES) for i in range(3)]
    for name, number in pictures:
        (tmp_path / "folder" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name / f"{number}.png").write_bytes(png(number))
    rows = [json.dumps({"img": f"folder/{name}/{number}.png", "colour": name}) for name, number in pictures]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, json.dumps({"img": "none.png", "colour": None})]))
    for shard in range(2):
        with tarfile.open(tmp_path / f"part-{shard}.tar", "w") as tar:
            for name, number in pictures[shard * 5 : shard * 5 + 5]:
                add(tar, f"{number:03d}.png", png(number))
                add(tar, f"{number:03d}.cls", f"{name}\n".encode())
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[*CLASSES, "unseen"])})
    columns = {
        "image": [{"bytes": png(n), "path": None} for _, n in pictures] + [{"bytes": png(0), "path": None}],
        "label": [CLASSES.index(name) for name, _ in pictures] + [-1],
    }
    made = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": made, "test": made.select(range(3))}).save_to_disk(tmp_path / "hub")
    return {
        "folder": (str(tmp_path / "folder"), data()),
        "jsonl": (str(tmp_path / "rows.jsonl"), data(label="colour", image="img")),
        "webdataset": (str(tmp_path / "part-{0..1}.tar"), data()),
        "hf": (f"hf:{tmp_path}/hub@train", data()),
    }


@pytest.mark.parametrize("kind", ["folder", "jsonl", "webdataset", "hf"])
def test_every_kind_gives_the_same_pictures(four: dict[str, tuple[str, LabelledDataConfig]], kind: str) -> None:
    location, config = four[kind]
    source = open_labelled(location, config)
    assert source.labels == [name for name in CLASSES for _ in range(3)] and len(source) == 9
    assert source.classes == ([*CLASSES, "unseen"] if kind == "hf" else list(CLASSES))
    again = pickle.loads(pickle.dumps(source))  # loader processes get it so
    assert [again.pictures.read(i) for i in range(9)] == [png(i) for i in range(9)]
    assert len(set(source.keys)) == 9 and source.targets(CLASSES) == [0] * 3 + [1] * 3 + [2] * 3
    named = open_labelled(location, config.model_copy(update={"type": kind}))
    assert named == source or kind == "hf"
    assert named.fingerprint == source.fingerprint and named.pictures_fingerprint == source.pictures_fingerprint


@pytest.mark.parametrize("kind", ["folder", "jsonl", "webdataset", "hf"])
def test_a_limit_is_drawn_over_all_classes_and_stays(four: dict[str, tuple[str, LabelledDataConfig]], kind: str) -> None:
    location, config = four[kind]
    full = open_labelled(location, config)
    few = open_labelled(location, config.model_copy(update={"limit": 4}))
    again = open_labelled(location, config.model_copy(update={"limit": 4}))
    assert len(few) == 4 and few.keys == again.keys and few.fingerprint == again.fingerprint != full.fingerprint
    # Not the first four: folders come sorted by class.
    assert few.labels[-1] == "white" and few.classes == full.classes
    for i, key in enumerate(few.keys):
        j = full.keys.index(key)
        assert few.labels[i] == full.labels[j] and few.pictures.read(i) == full.pictures.read(j)
    assert open_labelled(location, config.model_copy(update={"limit": 100})).keys == full.keys


@pytest.mark.parametrize("kind", ["folder", "jsonl", "webdataset", "hf"])
def test_a_long_picture_is_refused_unread(four: dict[str, tuple[str, LabelledDataConfig]], kind: str) -> None:
    location, config = four[kind]
    longest = max(len(png(number)) for number in range(9))
    allowed, small = (
        open_labelled(location, config.model_copy(update={"max_bytes": size, "limit": 4})) for size in (longest, longest // 2)
    )
    assert allowed.pictures.read(0).startswith(b"\x89PNG") and allowed.fingerprint == small.fingerprint
    with pytest.raises(SampleError, match=rf"bytes are over the limit of {longest // 2}$"):
        small.pictures.read(0)


def test_fingerprints_follow_labels_and_pictures(four: dict[str, tuple[str, LabelledDataConfig]], tmp_path: Path) -> None:
    location, config = four["jsonl"]
    before = open_labelled(location, config)
    path = Path(location)
    path.write_text(path.read_text().replace('"red"', '"pink"'))
    relabelled = open_labelled(location, config)
    assert relabelled.fingerprint != before.fingerprint
    assert relabelled.pictures_fingerprint == before.pictures_fingerprint  # so the features need not be made again
    (tmp_path / "folder" / "red" / "4.png").write_bytes(png(99) + b"more")
    assert open_labelled(location, config).pictures_fingerprint != before.pictures_fingerprint


def test_a_folder_of_tars_is_webdataset_and_numbers_sort_as_numbers(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in (10, 9, 0):
            add(tar, f"{number}.jpg", b"x")
            add(tar, f"{number}.cls", str(number).encode())
    source = open_labelled(str(tmp_path), data())
    assert source.labels == ["10", "9", "0"] and source.classes == ["0", "9", "10"]
    assert open_labelled(f"{tmp_path}/*.tar", data()).labels == source.labels
    assert open_labelled(f"{tmp_path}/a.tar", data()).keys == [f"{tmp_path}/a.tar:{n}" for n in (10, 9, 0)]


@given(st.lists(st.one_of(st.integers(0, 2000).map(str), st.text(min_size=1, max_size=4)), min_size=1))
def test_classes_are_sorted_once_each(labels: list[str]) -> None:
    classes = sort_classes(labels)
    assert set(classes) == set(labels) and len(classes) == len(set(labels))
    if all(map(is_number, labels)):
        assert [int(name) for name in classes] == sorted(int(name) for name in set(labels))


def test_faults_of_shards_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "0.jpg", b"x")
    with pytest.raises(InputError, match=r"a\.tar:0: no \.cls; write the shard again"):
        open_labelled(str(tmp_path / "a.tar"), data())
    for content, fault in ((b"\xff", "invalid start byte"), (b" \n", "the class is empty")):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            add(tar, "0.jpg", b"x")
            add(tar, "0.cls", content)
        with pytest.raises(InputError, match=rf"a\.tar:0: \.cls: .*{fault}"):
            open_labelled(str(tmp_path / "a.tar"), data())
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "0.jpg", bytes(2000))
        add(tar, "0.cls", b"1")
        add(tar, "1.jpg", bytes(2000))
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:4600])
    with pytest.raises(InputError, match=r"a\.tar:1: the shard is cut off here; write or fetch"):
        open_labelled(str(tmp_path / "a.tar"), data())


ROWS = ["{", '{"image": "a.png"}', "[1]", '{"colour": "red"}', '{"image": "../a.png", "colour": "red"}']
ROWS += ['{"image": "a.png", "colour": [1]}', '{"image": "a.png", "colour": " "}']


@pytest.mark.parametrize("row", ROWS)
def test_a_bad_row_is_named(tmp_path: Path, row: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "colour": "red"}\n' + row + "\n")
    with pytest.raises(InputError, match=r"rows\.jsonl:2: bad row .*each row needs image and 'colour'"):
        open_labelled(str(tmp_path / "rows.jsonl"), data(label="colour"))


@given(st.binary(max_size=60))
def test_any_bytes_are_rows_or_a_named_fault(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_bytes(b'{"image": "a.png", "label": 1}\n' + content)
    try:
        assert open_labelled(str(file), data()).labels[0] == "1"
    except InputError as error:
        assert str(error).startswith(f"{file}:") and "\n" not in str(error.where)


def test_faults_of_data_sets_are_named(four: dict[str, tuple[str, LabelledDataConfig]], tmp_path: Path) -> None:
    hub = f"hf:{tmp_path}/hub"
    with pytest.raises(InputError, match=r"which split is not said; write hf:.*@SPLIT with one of train, test"):
        open_labelled(hub, data())
    with pytest.raises(InputError, match=r"no split 'val'; .* one of train, test"):
        open_labelled(f"{hub}@val", data())
    with pytest.raises(InputError, match=r"no column 'class'; set data.image and data.label; there are image, label"):
        open_labelled(f"{hub}@test", data(label="class"))
    with pytest.raises(InputError, match=r"column 'label' holds .* no pictures"):
        open_labelled(f"{hub}@test", data(image="label"))
    with pytest.raises(InputError, match=r"cannot be loaded .*check the name"):
        open_labelled(f"hf:{tmp_path}/absent", data())
    assert open_labelled(f"{hub}@test", data()).labels == ["black"] * 3


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_names_of_keys_are_refused_where_there_are_none(four: dict[str, tuple[str, LabelledDataConfig]], kind: str) -> None:
    location, _ = four[kind]
    with pytest.raises(InputError, match=rf"image=odd has no effect on data of type {kind}; leave it out; it is for jsonl"):
        open_labelled(location, data(test=location, image="odd"))
    # Shipped recipes name a label and are run on any data.
    assert open_labelled(location, data(test=location, label="odd")).keys
    # The other of the two sets is read by them.
    rows, config = four["jsonl"]
    assert len(open_labelled(location, config.model_copy(update={"test": rows}))) == 9


def test_a_data_set_without_class_names_and_one_in_parquet(tmp_path: Path) -> None:
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("int64")})
    columns = {"picture": [{"bytes": png(0), "path": None}, None, {"bytes": png(2), "path": None}], "kind": [7, 11, None]}
    made = datasets.Dataset.from_dict(columns, features=features)
    made.save_to_disk(tmp_path / "one")
    config = data(image="picture", label="kind")
    source = open_labelled(f"hf:{tmp_path}/one", config)
    assert source.labels == ["7", "11"] and source.classes == ["7", "11"] and source.keys[1].endswith("one row 1")
    with pytest.raises(SampleError, match="the row has no picture"):
        source.pictures.read(1)
    (tmp_path / "files").mkdir()
    made.to_parquet(tmp_path / "files" / "train.parquet")
    assert open_labelled(f"hf:{tmp_path}/files", config).labels == ["7", "11"]


def test_nothing_labelled_is_refused(four: dict[str, tuple[str, LabelledDataConfig]], tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text('{"image": "a.png", "label": null}\n')
    with pytest.raises(InputError, match="no labelled picture"):
        open_labelled(str(tmp_path / "none.jsonl"), data())
    with pytest.raises(InputError, match="no such file or folder"):
        open_labelled(str(tmp_path / "absent"), data())
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no labelled picture"):
        open_labelled(str(tmp_path / "empty"), data())
    with pytest.raises(InputError, match="classes white are not in the training set"):
        open_labelled(*four["folder"]).targets(["black", "red"])
