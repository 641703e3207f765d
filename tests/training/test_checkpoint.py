"""Checkpoints: complete or absent, written in the background, checked before use, and what a full disk leaves of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_disk import fill

from mmkit.distributed.snapshot import StateFile
from mmkit.errors import InputError
from mmkit.training.checkpoint import Saver, faults, list_checkpoints, load_newest, newest_step, put_aside_unsound


class FakeEngine:
    """One process whose whole state is a number and a piece of ballast."""

    is_main, world_size, rank = True, 1, 0

    def __init__(self, ballast: int = 10) -> None:
        self.value, self.ballast = 0, torch.zeros(ballast, dtype=torch.uint8)
        # Called before a file is written, in the thread that writes.
        self.before: Callable[[], None] = lambda: None
        self.copied = True

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def numbers(self, *values: float) -> torch.Tensor:
        return torch.tensor(values)

    def barrier(self) -> None:
        pass

    def gather(self, rows: list) -> list:
        return rows

    def on_main(self, work: Callable[[], None]) -> None:
        work()

    def snapshot(self) -> tuple[list[StateFile], bool]:
        engine = self

        class File(StateFile):
            def write(self, folder: Path) -> None:
                engine.before()
                super().write(folder)

        ballast = {"ballast": self.ballast.clone()}
        return [File("zero/ballast.safetensors", ballast), File("value.pt", {"value": self.value, **ballast})], self.copied

    def load(self, folder: Path) -> None:
        self.value = torch.load(folder / "value.pt", weights_only=True)["value"]


def save(engine: FakeEngine, folder: Path, *steps: int, keep: int = 2) -> Saver:
    saver = Saver(engine, folder, keep=keep)
    for step in steps:
        engine.value = step * 10
        saver.save(step)
    saver.wait()
    saver.close()
    return saver


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_newest_is_loaded_and_old_ones_go(tmp_path):
    save(FakeEngine(), tmp_path, 1, 2, 10)
    assert names(tmp_path) == ["step-00000002", "step-00000010"] == [p.name for p in list_checkpoints(tmp_path)]
    fresh = FakeEngine()
    assert put_aside_unsound(fresh, tmp_path) == []
    assert load_newest(fresh, tmp_path) == 10 and fresh.value == 100
    state = json.loads((tmp_path / "step-00000010" / "state.json").read_text())
    assert (state["step"], state["world_size"], sorted(state["files"])) == (10, 1, ["value.pt", "zero/ballast.safetensors"])
    assert names(tmp_path / "step-00000010") == ["state.json", "value.pt", "zero"]


def test_none_is_step_zero(tmp_path):
    engine = FakeEngine()
    for folder in (tmp_path / "absent", tmp_path):
        assert put_aside_unsound(engine, folder) == [] and load_newest(engine, folder) == 0 and engine.value == 0


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    engine, may_write = FakeEngine(), threading.Event()
    engine.before = lambda: may_write.wait(10) or pytest.fail("nothing was written")
    saver = Saver(engine, tmp_path, keep=2)
    engine.value = 10
    saver.save(1)
    # It came back although not a byte is written, and what is changed now is not what will be written.
    engine.value = 99
    engine.ballast += 1
    assert names(tmp_path) in ([], [".step-00000001"]) and not saver.failed and saver.times() == {}
    may_write.set()
    saver.wait()
    assert names(tmp_path) == ["step-00000001"]
    times = saver.times()
    assert set(times) == {"save_stall_seconds", "save_write_seconds"} and min(times.values()) >= 0 and saver.times() == {}
    assert saver.totals["count"] == 1
    saver.close()
    state = torch.load(tmp_path / "step-00000001" / "value.pt", weights_only=True)
    assert state["value"] == 10 and not state["ballast"].any()


def test_without_copies_the_files_are_written_before_training_goes_on(tmp_path):
    engine, written = FakeEngine(), []
    engine.copied, engine.before = False, lambda: written.append(1)
    saver = Saver(engine, tmp_path, keep=2)
    saver.save(1)
    assert len(written) == 2
    saver.wait()
    saver.close()
    assert names(tmp_path) == ["step-00000001"]


def test_the_twin_in_the_foreground_writes_the_same_bytes(tmp_path):
    for background in (True, False):
        saver = Saver(FakeEngine(), tmp_path / str(background), keep=2, background=background)
        saver.save(1)
        if not background:
            assert names(tmp_path / "False") == ["step-00000001"]
        saver.wait()
        assert set(saver.times()) == {"save_stall_seconds", "save_write_seconds"}
        saver.close()
    found = [
        {p.name: p.read_bytes() for p in (tmp_path / b / "step-00000001").rglob("*") if p.is_file()} for b in ("True", "False")
    ]
    assert found[0] == found[1] and len(found[0]) == 3


@pytest.mark.parametrize("number", [28, 5])
def test_a_failed_write_is_told_once_and_leaves_the_old_one(tmp_path, number):
    engine = FakeEngine()
    save(engine, tmp_path, 1)

    def break_down() -> None:
        raise OSError(number, "reason")

    engine.before = break_down
    saver = Saver(engine, tmp_path, keep=2)
    saver.save(2)
    expected = r"the checkpoint of step 2 cannot be written \(.*\); the checkpoint of step 1 is whole; (free some space|look at)"
    with pytest.raises(InputError, match=expected):
        saver.wait()
    saver.wait()
    saver.close()
    assert names(tmp_path) == ["step-00000001"] and not faults(tmp_path / "step-00000001")


def test_an_error_of_another_kind_is_not_hidden(tmp_path):
    engine = FakeEngine()
    engine.before = lambda: {}["bug"]
    saver = Saver(engine, tmp_path, keep=2)
    saver.save(2)
    with pytest.raises(KeyError, match="bug"):
        saver.wait()
    saver.close()
    assert names(tmp_path) == []


def save_fails(engine: FakeEngine, folder: Path, message: str) -> None:
    """Saving step 2 is refused with a message; the checkpoint before it is whole, and nothing else is left."""
    saver = Saver(engine, folder, keep=2)
    saver.save(2)
    with pytest.raises(InputError, match=message):
        saver.wait()
    saver.close()
    assert names(folder) == ["step-00000001"] and not faults(folder / "step-00000001")


@pytest.mark.parametrize("leave", [0, 100_000, 700_000])
def test_a_real_full_disk(small_disk, leave):
    # At nothing left, within the first file, and within the second one.
    engine, folder = FakeEngine(ballast=500_000), small_disk / "checkpoints"
    save(engine, folder, 1)
    fill(small_disk, leave=leave)
    save_fails(engine, folder, r"step 2 cannot be written \(No space left on device\); the checkpoint")
    (small_disk / "filler").unlink()
    save(engine, folder, 2)
    assert newest_step(folder) == 2


def test_a_disk_that_turns_read_only(small_disk):
    engine, folder = FakeEngine(), small_disk / "checkpoints"
    save(engine, folder, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    save_fails(engine, folder, r"step 2 cannot be written \(Read-only file system\)")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = ["value.pt", "zero/ballast.safetensors", "state.json"]


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, caplog, file, damage):
    engine = FakeEngine()
    save(engine, tmp_path, 1, 2)
    damage(tmp_path / "step-00000002" / file)
    (aside,) = put_aside_unsound(engine, tmp_path)
    assert aside.startswith(f"step-00000002 ({file}: ")
    assert "checkpoint step-00000002 is damaged" in caplog.text and "set aside as step-00000002.bad" in caplog.text
    assert names(tmp_path) == ["step-00000001", "step-00000002.bad"]
    assert load_newest(engine, tmp_path) == 1 and engine.value == 10
    # Not counted again, neither as a checkpoint to load nor as one of those to keep; the same step may come again.
    assert put_aside_unsound(engine, tmp_path) == []
    save(engine, tmp_path, 2, 3)
    assert names(tmp_path) == ["step-00000002", "step-00000002.bad", "step-00000003"]
    damage(tmp_path / "step-00000003" / file)
    damage(tmp_path / "step-00000002" / file)
    with pytest.raises(InputError, match=r"no checkpoint is sound \(.*step-00000002\.bad\.1, step-00000003\.bad\); put"):
        put_aside_unsound(engine, tmp_path)
    # Asked again it still does not begin at step 0.
    with pytest.raises(InputError, match="no checkpoint is sound"):
        put_aside_unsound(engine, tmp_path)


def test_any_flipped_byte_of_the_state_file_is_noticed(tmp_path):
    save(FakeEngine(), tmp_path, 1)
    path = tmp_path / "step-00000001" / "state.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 2
        path.write_bytes(broken)
        # White space may be another white space: then nothing is wrong with what it says.
        try:
            same = json.loads(broken) == json.loads(whole)
        except ValueError:
            same = False
        assert same or faults(path.parent), bytes(broken)


def test_checkpoints_of_the_first_version_are_taken(tmp_path):
    folder = tmp_path / "step-00000004"
    folder.mkdir()
    torch.save({"value": 4}, folder / "value.pt")
    (folder / "state.json").write_text('{"step": 4, "world_size": 1}')
    engine = FakeEngine()
    assert put_aside_unsound(engine, tmp_path) == [] and load_newest(engine, tmp_path) == 4 and engine.value == 4


def test_folders_without_a_state_or_with_another_name_are_no_checkpoints(tmp_path):
    save(FakeEngine(), tmp_path, 3)
    for name in ("step-00000009", "step-4", "other"):
        (tmp_path / name).mkdir()
    shutil.copy(tmp_path / "step-00000003" / "state.json", tmp_path / "step-4" / "state.json")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000003"]


def test_what_kills_left_is_removed_before_the_next_save(tmp_path):
    save(FakeEngine(), tmp_path, 3)
    for name in (".step-00000004", ".step-00000002.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.json").write_text("{}")
    put_aside_unsound(FakeEngine(), tmp_path)
    assert names(tmp_path) == ["step-00000003"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(FakeEngine(), tmp_path, 3)
    (tmp_path / "step-00000003" / "stray").write_text("old")
    save(FakeEngine(), tmp_path, 3)
    assert not (tmp_path / "step-00000003" / "stray").exists()


def test_a_deepspeed_checkpoint_is_refused_by_a_plain_engine(tmp_path):
    from mmkit.distributed.engine import Engine

    engine = Engine(precision="fp32", deepspeed=None, batch_size=4, micro_batch_size=None, clip=None)
    try:
        (tmp_path / "zero").mkdir()
        with pytest.raises(InputError, match=r"in DeepSpeed's own format, which is no longer read"):
            engine.load(tmp_path)
    finally:
        engine.close()
