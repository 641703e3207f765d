"""Files and folders that are complete or absent, JSON that says where it is broken, and content hashes."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmkit.errors import InputError
from mmkit.files import hash_file, hash_folder, hash_text, new_folder, read_json, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_write_text_replaces_whole_and_is_readable(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "one\n")
    write_text(path, "zwei ü\n")
    assert path.read_bytes() == "zwei ü\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert names(path.parent) == ["a.txt"]


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(InputError, match=r"a\.txt: cannot be written \(No space left on device\); free some space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_write_json_refuses_what_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"ü": [1, None]})
    assert path.read_text(encoding="utf-8").endswith("}\n")
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"x": float("nan")})
    assert read_json(path) == {"ü": [1, None]}


def test_read_json_tells_where_and_why(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(InputError, match=r"a\.json: no such file; mend it"):
        read_json(path, mend="mend it")
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path)
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}
    path.write_bytes(b'{"a": \xff}')
    with pytest.raises(InputError, match="cannot be read"):
        read_json(path)
    path.write_text('{"a": 1,\n "b": x}')
    with pytest.raises(InputError, match=r"a\.json:2:7: is not JSON") as caught:
        read_json(path)
    assert "cut off" not in str(caught.value)


@given(st.integers(1, 60))
def test_every_cut_is_called_a_cut(end: int) -> None:
    whole = json.dumps({"images": [{"id": 1, "name": "a b"}], "annotations": [{"caption": "x"}]})
    path = Path(tempfile.gettempdir()) / f"mmkit-cut-{os.getpid()}.json"
    path.write_text(whole[:end])
    try:
        with pytest.raises(InputError, match=r"cut off|Expecting") as caught:
            read_json(path)
        assert f"{path}:1:" in str(caught.value)
    finally:
        path.unlink()


def test_new_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model"
    with new_folder(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert not path.exists()
        assert folder.parent == path.parent, "a rename must stay on one file system"
    assert (path / "sub" / "a").read_text() == "1"
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert names(path.parent) == ["model"]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_crash_in_new_folder_leaves_nothing(tmp_path: Path, kind: type[BaseException]) -> None:
    with pytest.raises(kind), new_folder(tmp_path / "model") as folder:
        (folder / "half").write_text("x")
        raise kind
    assert names(tmp_path) == []


def test_crash_in_new_folder_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with new_folder(path) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), new_folder(path) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError
    assert (path / "a").read_text() == "old"
    with new_folder(path) as folder:
        (folder / "b").write_text("new")
    assert names(path) == ["b"]
    assert names(tmp_path) == ["model"]


def test_hashes_see_names_and_contents_but_not_hidden_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "a").write_text("1")
    one, two = tmp_path / "one", tmp_path / "two"
    before = hash_folder(one)
    assert before == hash_folder(two)
    (two / ".hidden").write_text("x")
    assert hash_folder(two) == before
    (two / "sub" / "a").rename(two / "sub" / "b")
    assert hash_folder(two) != before
    (one / "sub" / "a").write_text("2")
    assert hash_folder(one) != before
    assert len(hash_file(one / "sub" / "a")) == 32
    assert hash_text("a", "b") != hash_text("ab")
