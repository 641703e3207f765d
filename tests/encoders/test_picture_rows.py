"""Rows of pictures in a mapped file."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from mmkit.data.images import ImageRef
from mmkit.encoders import picture_rows as module
from mmkit.encoders.picture_rows import picture_rows
from mmkit.errors import InputError

PICTURES = [ImageRef(f"/data/{i % 7}/{i}.jpg") for i in range(200)] + [ImageRef("a.tar", 512 * i, 9) for i in range(20)]


def test_every_picture_has_its_row_and_no_other_has_one(tmp_path: Path) -> None:
    rows = picture_rows(tmp_path / "x.rows", PICTURES)
    again = pickle.loads(pickle.dumps(picture_rows(tmp_path / "x.rows", PICTURES)))
    assert [rows[p] for p in PICTURES] == [again[p] for p in PICTURES] == list(range(len(PICTURES)))
    for other in (ImageRef("/data/0/1.jpg"), ImageRef("a.tar", 3, 9)):
        with pytest.raises(KeyError):
            rows[other]


def test_it_is_written_once_and_again_when_it_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "x.rows"
    picture_rows(path, PICTURES)
    before = path.read_bytes()

    class Number(list):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(PICTURES)

        def __iter__(self) -> object:
            raise AssertionError("listed again")

    assert picture_rows(path, Number())[PICTURES[3]] == 3
    path.write_bytes(before[:-8])
    assert picture_rows(path, PICTURES)[PICTURES[3]] == 3 and path.read_bytes() == before


def test_pictures_whose_first_words_are_equal_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = module._hashes
    monkeypatch.setattr(module, "_hashes", lambda picture: (hashes(picture)[0] % 3, hashes(picture)[1]))
    rows = picture_rows(tmp_path / "x.rows", PICTURES)
    assert [rows[p] for p in PICTURES] == list(range(len(PICTURES)))


def test_no_pictures(tmp_path: Path) -> None:
    rows = picture_rows(tmp_path / "x.rows", [])
    with pytest.raises(KeyError):
        rows[PICTURES[0]]


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "new_file", full)
    with pytest.raises(InputError, match="cannot be written"):
        picture_rows(tmp_path / "x.rows", PICTURES)
