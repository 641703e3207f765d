from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mmkit.errors import InputError
from mmkit.training.checkpoint import list_checkpoints, load_newest, save_checkpoint


class FakeEngine:
    """One process whose whole state is a number."""

    is_main, world_size = True, 1

    def __init__(self) -> None:
        self.value, self.fails = 0, False

    def barrier(self) -> None:
        pass

    def save(self, folder: Path) -> None:
        torch.save({"value": self.value}, folder / "model.pt")
        if self.fails:
            raise OSError("disk full")

    def load(self, folder: Path) -> None:
        self.value = torch.load(folder / "model.pt", weights_only=True)["value"]


def save(engine: FakeEngine, folder: Path, step: int, keep: int = 2) -> None:
    engine.value = step * 10
    save_checkpoint(engine, folder, step, keep=keep)


def test_newest_is_loaded_and_old_ones_go(tmp_path):
    engine = FakeEngine()
    for step in (1, 2, 10):
        save(engine, tmp_path, step)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]
    fresh = FakeEngine()
    assert load_newest(fresh, tmp_path) == 10 and fresh.value == 100
    assert json.loads((tmp_path / "step-00000010" / "state.json").read_text()) == {"step": 10, "world_size": 1}


def test_none_is_step_zero(tmp_path):
    engine = FakeEngine()
    assert load_newest(engine, tmp_path / "absent") == 0 and load_newest(engine, tmp_path) == 0 and engine.value == 0


def test_a_broken_write_leaves_the_old_one_valid(tmp_path):
    engine = FakeEngine()
    save(engine, tmp_path, 1)
    engine.fails = True
    with pytest.raises(OSError, match="disk full"):
        save(engine, tmp_path, 2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000001"]
    # The half-written one is under a hidden name and is thrown away by the next attempt.
    assert (tmp_path / ".step-00000002").is_dir()
    engine.fails = False
    save(engine, tmp_path, 2)
    assert not (tmp_path / ".step-00000002").exists() and load_newest(FakeEngine(), tmp_path) == 2


def test_folders_without_a_state_or_with_another_name_are_no_checkpoints(tmp_path):
    save(FakeEngine(), tmp_path, 3)
    for name in ("step-00000009", "step-4", "other"):
        (tmp_path / name).mkdir()
    shutil.copy(tmp_path / "step-00000003" / "state.json", tmp_path / "step-4" / "state.json")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000003"]


def test_saving_a_step_again_replaces_it(tmp_path):
    engine = FakeEngine()
    save(engine, tmp_path, 3)
    (tmp_path / "step-00000003" / "stray").write_text("old")
    save(engine, tmp_path, 3)
    assert not (tmp_path / "step-00000003" / "stray").exists()


def test_a_deepspeed_checkpoint_is_refused_by_a_plain_engine(tmp_path):
    from mmkit.distributed.engine import Engine

    engine = Engine(precision="fp32", deepspeed=None, batch_size=4, micro_batch_size=None, clip=None)
    try:
        (tmp_path / "zero").mkdir()
        with pytest.raises(InputError, match=r"written in deepspeed mode; keep train\.deepspeed, or --restart"):
            engine.load(tmp_path)
    finally:
        engine.close()
