from __future__ import annotations

import io
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmkit.distributed import snapshot
from mmkit.distributed.engine import Engine
from mmkit.distributed.snapshot import HostCopies, StateFile, _Noting, room_for, state_size


def state() -> dict:
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.arange(6.0).reshape(2, 3).T}}, "lr": 0.1}
    return {"optimizer": optimizer, "groups": [torch.ones(2), (torch.zeros(1), "text")], "module": OrderedDict(w=torch.ones(3))}


def test_a_copy_is_equal_and_apart():
    copies, live = HostCopies(), state()
    taken = copies.of(live, "a")
    live["optimizer"]["state"][0]["exp_avg"] += 1
    live["groups"][0] += 1
    live["groups"].append("more")
    buffer = io.BytesIO()
    torch.save(taken, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=True)
    assert torch.equal(read["optimizer"]["state"][0]["exp_avg"], torch.arange(6.0).reshape(2, 3).T)
    assert torch.equal(read["groups"][0], torch.ones(2)) and len(read["groups"]) == 2 and read["groups"][1][1] == "text"
    assert read["optimizer"]["lr"] == 0.1 and list(read["module"]) == ["w"]
    assert state_size(taken) == 4 * (1 + 6 + 2 + 1 + 3)


def test_memory_is_kept_for_the_next_snapshot_and_follows_a_change_of_shape():
    copies = HostCopies()
    first = copies.of({"w": torch.zeros(4)}, "a")["w"]
    second = copies.of({"w": torch.ones(4)}, "a")["w"]
    assert second.data_ptr() == first.data_ptr() and second.sum() == 4
    assert copies.of({"w": torch.ones(5)}, "a")["w"].shape == (5,)
    assert copies.of({"w": torch.ones(4)}, "b")["w"].data_ptr() != second.data_ptr()
    assert copies.has("a") and copies.has("b") and not copies.has("c")


@pytest.mark.parametrize("name", ["deep/w.safetensors", "deep/w.pt"])
def test_files_are_written_in_the_format_of_their_name(tmp_path, name):
    StateFile(name, {"w": torch.arange(3)}).write(tmp_path)
    path = tmp_path / name
    read = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert read["w"].tolist() == [0, 1, 2]


def test_the_reason_of_a_failed_write_is_kept(tmp_path, monkeypatch):
    def full(self, data):
        self.error = OSError(28, "No space left on device")
        raise self.error

    monkeypatch.setattr(_Noting, "write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        StateFile("w.pt", {"w": torch.zeros(1000)}).write(tmp_path)
    assert caught.value.errno == 28


@pytest.mark.parametrize(("available", "fits"), [(1000, False), (4000, True)])
def test_room_is_asked_for_all_processes_of_the_machine(monkeypatch, available, fits):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(Path, "read_text", lambda self: f"MemTotal: 9 kB\nMemAvailable: {available} kB\n")
    assert room_for(500 * 1024) is fits


def test_without_room_the_live_tensors_are_written_before_training_goes_on(monkeypatch):
    engine = Engine(precision="fp32", deepspeed=None, batch_size=4, micro_batch_size=None, clip=None)
    try:
        module = torch.nn.Linear(2, 2)
        engine.prepare(module, torch.optim.AdamW(module.parameters()))
        monkeypatch.setattr("mmkit.distributed.engine.room_for", lambda size: False)
        files, copied = engine.snapshot()
        assert not copied and files[0].state["weight"].data_ptr() == module.weight.data_ptr()
        monkeypatch.undo()
        files, copied = engine.snapshot()
        assert copied and files[0].state["weight"].data_ptr() != module.weight.data_ptr()
        assert [f.name for f in files] == ["model.safetensors", "optimizer.pt"]
    finally:
        engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_snapshot_of_a_gpu_is_pinned_and_complete_before_the_next_update():
    copies, live = HostCopies(), torch.ones(1 << 24, device="cuda")
    taken = copies.of({"w": live}, "a")["w"]
    copies.finish(live.device)
    live += 1
    assert taken.is_pinned() and torch.equal(taken, torch.ones(1 << 24))


def test_the_limit_of_a_container_counts(tmp_path):
    group = tmp_path / "fs" / "job" / "step"
    group.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    for folder, limit, used in ((group, "max", 70), (group.parent, "1000", 300), (tmp_path / "fs", "5000", 10)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    assert sorted(snapshot._spare_of_groups(tmp_path / "cgroup", tmp_path / "fs")) == [700, 4990]
    # Where there are no groups, or of the old kind, the machine's memory is all that is known.
    assert snapshot._spare_of_groups(tmp_path / "none", tmp_path / "fs") == []
    (tmp_path / "cgroup").write_text("4:memory:/job\n")
    assert snapshot._spare_of_groups(tmp_path / "cgroup", tmp_path / "fs") == []
