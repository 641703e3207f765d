"""Signals, full disks, damaged checkpoints and broken numbers, through the real command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import zlib
from pathlib import Path

import pipeline
import pytest
import torch
from small_disk import fill

from mmkit import files
from mmkit.data.layout import Layout
from mmkit.data.order import make_order
from mmkit.distributed import snapshot
from mmkit.recipes import recipe_folders
from mmkit.training import loop, space
from mmkit.training.step_log import batch_digest

SIX = ["train.steps=6", "train.checkpoint_every=2", "track.kind=none"]
ZERO = pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed on CPUs and CUDA do not mix in one environment")


def zero2() -> str:
    return f"train.deepspeed={recipe_folders()['deepspeed'] / 'zero2.json'}"


def checkpoints(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.001)


def last_line(capsys) -> str:
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_while_the_product_is_saved_is_held(tmp_path, monkeypatch, number):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("mmkit.files._new_folder", _signalling(number))
        assert pipeline.mmkit(*pipeline.superclass(run, *SIX)) == 0
    assert pipeline.manifest(run)["status"] == "done" and (run / "model").is_dir()


def _signalling(number: int):
    made = files._new_folder

    def signalling(path):
        # The world's own folders are made in the same way, perhaps on the way here.
        if path.name == "model":
            os.kill(os.getpid(), number)
        return made(path)

    return signalling


def test_a_signal_while_a_checkpoint_is_saved_is_held(tmp_path, monkeypatch):
    run, write = tmp_path / "run", snapshot.StateFile.write

    def signalling(self, folder):
        if folder.name == ".step-00000002":
            os.kill(os.getpid(), signal.SIGTERM)
        write(self, folder)

    monkeypatch.setattr(snapshot.StateFile, "write", signalling)
    assert pipeline.mmkit(*pipeline.superclass(run, *SIX, "train.steps=4000")) == 75
    found = checkpoints(run)
    assert found[0] == "step-00000002" or len(found) == 2, found
    assert pipeline.manifest(run)["status"] == "stopped" and not any(name.startswith(".") for name in found)


def test_a_kill_while_the_product_is_saved_costs_no_step(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(path):
        raise Killed

    run = tmp_path / "run"
    arguments = pipeline.superclass(run, "train.steps=3", "track.kind=none")
    pipeline.root()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("mmkit.files._new_folder", die)
        pipeline.mmkit(*arguments)
    assert checkpoints(run) == ["step-00000003"] and pipeline.manifest(run)["status"] == "running"
    monkeypatch.setattr(loop, "lr_scale", lambda *a, **k: pytest.fail("a step was made again"))
    assert pipeline.mmkit(*arguments) == 0
    assert [r["step"] for r in pipeline.rows(run / "metrics.jsonl")] == [1, 2, 3]
    straight = tmp_path / "straight"
    monkeypatch.undo()
    assert pipeline.mmkit(*pipeline.superclass(straight, "train.steps=3", "track.kind=none")) == 0
    assert pipeline.largest_difference(run, straight) == 0.0


def test_times_of_saves_are_in_metrics_and_manifest(tmp_path):
    run = tmp_path / "run"
    assert pipeline.mmkit(*pipeline.superclass(run, "train.steps=40", "train.checkpoint_every=2", "track.kind=none")) == 0
    rows = [row for row in pipeline.rows(run / "metrics.jsonl") if "save_stall_seconds" in row]
    assert rows and all(row["save_stall_seconds"] > 0 and row["save_write_seconds"] > 0 for row in rows)
    saves = pipeline.manifest(run)["saves"]
    assert saves["count"] == 20 and saves["stall_seconds"] > 0 and saves["write_seconds"] > 0


def test_the_digest_is_of_the_global_batch(tmp_path):
    world = pipeline.root() / "world" / "pairs_train.jsonl"
    run, more = tmp_path / "run", [f"data.train={world}", "track.kind=none"]
    assert pipeline.mmkit(*pipeline.superclass(run, *more)) == 0
    digests = [row["batch_digest"] for row in pipeline.rows(run / "metrics.jsonl")]
    assert len(set(digests)) == 4 and all(isinstance(d, int) for d in digests)
    assert pipeline.mmkit(*pipeline.superclass(tmp_path / "parts", *more, "train.micro_batch_size=2", "data.workers=2")) == 0
    assert [row["batch_digest"] for row in pipeline.rows(tmp_path / "parts" / "metrics.jsonl")] == digests
    assert pipeline.mmkit(*pipeline.superclass(tmp_path / "seed", *more, "seed=1")) == 0
    assert [row["batch_digest"] for row in pipeline.rows(tmp_path / "seed" / "metrics.jsonl")] != digests


def test_digest_of_keys():
    keys = ["a", "b", "caf\udce9"]
    assert batch_digest(keys) == batch_digest(keys[::-1]) == batch_digest(keys[:1]) + batch_digest(keys[1:])
    assert batch_digest(["a"]) == zlib.crc32(b"a") and batch_digest([]) == 0


def damaged_run(run: Path, damage, which: list[int]) -> list[str]:
    """A run killed after step 6 of 8, some of its checkpoints damaged; its arguments."""
    arguments = pipeline.clipcap(run, "train.steps=8", "train.checkpoint_every=2", "train.keep_checkpoints=3", "track.kind=none")
    assert pipeline.mmkit(*arguments) == 0
    shutil.copytree(run / "model", run.parent / "straight" / "model")
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    (run / "manifest.json").write_text(json.dumps({**pipeline.manifest(run), "status": "running"}))
    for step in which:
        damage(run / "checkpoints" / f"step-{step:08d}" / "optimizer.pt")
    return arguments


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-100])])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, caplog, damage):
    run = tmp_path / "run"
    arguments = damaged_run(run, damage, [6])
    caplog.clear()
    assert pipeline.mmkit(*arguments) == 0
    assert (
        "step-00000006 is damaged (optimizer.pt: " in caplog.text and "going on from the checkpoint at step 4 of 8" in caplog.text
    )
    (note,) = pipeline.manifest(run)["checkpoints_set_aside"]
    assert note.startswith("step-00000006 (optimizer.pt: ")
    assert checkpoints(run) == ["step-00000004", "step-00000006", "step-00000006.bad", "step-00000008"]
    assert [r["step"] for r in pipeline.rows(run / "metrics.jsonl")] == list(range(1, 9))
    assert pipeline.largest_difference(run, tmp_path / "straight") == 0.0


def test_no_sound_checkpoint_is_refused_every_time(tmp_path, capsys):
    run = tmp_path / "run"
    arguments = damaged_run(run, flip, [4, 6])
    for _ in range(2):
        capsys.readouterr()
        assert pipeline.mmkit(*arguments) == 2
        assert "no checkpoint is sound (step-00000004.bad, step-00000006.bad); put a good copy there" in last_line(capsys)
        assert not (run / "model").exists()
    assert pipeline.mmkit(*arguments, "--restart") == 0
    assert pipeline.largest_difference(run, tmp_path / "straight") == 0.0


def test_too_little_space_is_refused_with_both_numbers(small_disk, capsys):
    run = small_disk / "run"
    fill(small_disk, leave=300_000)
    assert pipeline.mmkit(*pipeline.superclass(run, *SIX)) == 2
    line = last_line(capsys)
    assert "are needed (3 checkpoints of " in line and "and the product), 2" in line and "KiB are free; free some space" in line
    (small_disk / "filler").unlink()
    assert pipeline.mmkit(*pipeline.superclass(run, *SIX)) == 0


def test_the_estimate_is_honest(tmp_path):
    # Neither less than what is written, nor so much more that a run is refused that would have fitted.
    run = pipeline.trained("clipcap")
    written = sum(f.stat().st_size for f in (run / "checkpoints" / "step-00000004").rglob("*") if f.is_file())
    module = torch.nn.ModuleList([torch.nn.Linear(100, 100), torch.nn.Linear(100, 100).requires_grad_(False)])
    assert space.checkpoint_size(module) == 10_100 * 12
    assert space.product_size(module) == 20_200 * 4
    trainable = pipeline.manifest(run)["trainable_parameters"]
    assert trainable * 12 <= written < trainable * 12 * 1.5


@pytest.mark.parametrize("when", ["checkpoint", "product", "metrics"])
def test_a_disk_that_fills_up_is_reported_and_nothing_is_damaged(small_disk, monkeypatch, capsys, when):
    run = small_disk / "run"
    arguments = pipeline.superclass(run, *SIX)
    straight = pipeline.superclass(small_disk.parent / "straight", *SIX)
    assert pipeline.mmkit(*straight) == 0
    scale, patched = loop.lr_scale, pytest.MonkeyPatch()

    def filling(at: int, **more):
        if at == 3 and when == "checkpoint":
            fill(small_disk, leave=20_000)
        if at == 4 and when == "metrics":
            # Not while a checkpoint is being written, which would be the first to hear of it. A page of the file is left.
            wait_for(run / "checkpoints" / "step-00000004")
            fill(small_disk)
            monkeypatch.setattr(Path, "open", full)
        return scale(at, **more)

    opened, made = Path.open, files._new_folder

    def full(self, mode="r", *args, **more):
        if self.name == "metrics.jsonl" and "a" in mode:
            raise OSError(28, "No space left on device")
        return opened(self, mode, *args, **more)

    def full_product(path):
        fill(small_disk, leave=20_000)
        return made(path)

    with patched.context() as patch:
        patch.setattr(loop, "lr_scale", filling)
        if when == "product":
            patch.setattr("mmkit.files._new_folder", full_product)
        capsys.readouterr()
        assert pipeline.mmkit(*arguments) == 2
    monkeypatch.undo()
    line = last_line(capsys)
    assert line.startswith("mmkit: ") and "cannot be written (No space left on device)" in line and "free some space" in line
    place = {"checkpoint": "checkpoints: the checkpoint of step 4", "product": "run/model: ", "metrics": "metrics.jsonl: "}
    assert place[when] in line
    found = checkpoints(run)
    assert all(not name.startswith(".") for name in found) and found, found
    assert not (run / "model").exists() and not list(run.glob(".model.*"))
    (small_disk / "filler").unlink()
    assert pipeline.mmkit(*arguments) == 0
    assert pipeline.largest_difference(run, small_disk.parent / "straight") == 0.0
    assert [r["step"] for r in pipeline.rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_read_only_disk_is_refused_at_the_start(small_disk, capsys):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert pipeline.mmkit(*pipeline.superclass(small_disk / "run", *SIX)) == 2
    assert "run: cannot be written (Read-only file system); choose another place" in last_line(capsys)


def test_a_disk_that_turns_read_only_is_reported(small_disk, monkeypatch, capsys):
    run, scale = small_disk / "run", loop.lr_scale

    def turning(at: int, **more):
        if at == 3:
            subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        return scale(at, **more)

    # Metrics are written in between; a handle that is open for writing would keep the disk from turning.
    monkeypatch.setattr("mmkit.lock.FolderLock.take", lambda self: self._path.parent.mkdir(exist_ok=True))
    monkeypatch.setattr(loop, "lr_scale", turning)
    assert pipeline.mmkit(*pipeline.superclass(run, *SIX)) == 2
    assert "cannot be written (Read-only file system); choose another place" in last_line(capsys)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert checkpoints(run)[0] == "step-00000002"


def test_broken_numbers_are_written_down_with_the_whole_batch(tmp_path, capsys):
    run = tmp_path / "run"
    assert pipeline.mmkit(*pipeline.finetune(run, "train.lr=1e30", "train.micro_batch_size=2", "track.kind=none")) == 2
    line = last_line(capsys)
    found = json.loads((run / "nonfinite.json").read_text())
    assert f"{run / 'nonfinite.json'}: " in line and f"is not finite at step {found['step']} (samples: " in line
    assert set(found) == {"step", "loss", "grad_norm", "keys"} and {found["loss"], found["grad_norm"]} & {"nan", "inf"}
    order = make_order(Layout.flat(80), 0).positions((found["step"] - 1) * 8, 8)
    assert len(found["keys"]["0"]) == len(order) == 8


@ZERO
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero2"])
def test_broken_numbers_on_two_processes(zygote, tmp_path, mode):
    # The update of the broken step has not happened: the weights are those after the step before.
    run, log = tmp_path / "run", tmp_path / "log"
    before = (
        "import torch\nfrom mmkit.training import loop, step_log\nfrom mmkit.distributed.engine import Engine\n"
        "forward, saved, steps = Engine.forward_backward, {}, [0]\n"
        "def breaking(self, batch, **more):\n"
        "    loss = forward(self, batch, **more)\n"
        "    steps[0] += 1\n"
        "    if steps[0] == 2: saved.update({k: v.clone() for k, v in self.unwrapped().state_dict().items()})\n"
        "    return loss * float('nan') if steps[0] == 2 and self.rank == 1 else loss\n"
        "Engine.forward_backward = breaking\n"
        "told = step_log.StepLog._not_finite\n"
        "def checking(self, *facts):\n"
        "    now = self.engine.unwrapped().state_dict()\n"
        "    assert saved and all(torch.equal(now[k], v) for k, v in saved.items()), 'the update happened'\n"
        "    told(self, *facts)\n"
        "step_log.StepLog._not_finite = checking\n"
    )
    arguments = pipeline.finetune(run, "track.kind=none", *([zero2()] if mode == "zero2" else []))
    codes = [zygote.wait(pid) for pid in zygote.start(arguments, log, processes=2, before=before)]
    assert codes == [2, 2], log.read_text()[-3000:]
    found = json.loads((run / "nonfinite.json").read_text())
    assert found["step"] == 2 and found["loss"] == "nan" and sorted(found["keys"]) == ["0", "1"]
    assert [len(keys) for keys in found["keys"].values()] == [4, 4]
    assert set(found["keys"]["0"]).isdisjoint(found["keys"]["1"])
    assert [row["step"] for row in pipeline.rows(run / "metrics.jsonl")] == [1]


@ZERO
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_leaves_out_the_update_of_a_broken_gradient(zygote, tmp_path, stage):
    # A finite loss whose gradient is not: what DeepSpeed alone can see, or at stage 0 nobody but the engine.
    run, log, settings = tmp_path / "run", tmp_path / "log", tmp_path / "zero.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    before = (
        "import torch\nfrom mmkit.training import step_log\nfrom mmkit.distributed.engine import Engine\n"
        "update, saved, steps = Engine.update, {}, [0]\n"
        "class Break(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x): return x.clone()\n"
        "    @staticmethod\n"
        "    def backward(ctx, g): return g * float('inf')\n"
        "forward = Engine.forward_backward\n"
        "def breaking(self, batch, **more):\n"
        "    steps[0] += 1\n"
        "    if steps[0] == 2:\n"
        "        objective = self.unwrapped(); inner = objective.forward\n"
        "        objective.forward = lambda batch: Break.apply(inner(batch))\n"
        "        with self.gathered(): saved.update({k: v.clone() for k, v in objective.state_dict().items()})\n"
        "    return forward(self, batch, **more)\n"
        "Engine.forward_backward = breaking\n"
        "told = step_log.StepLog._not_finite\n"
        "def checking(self, *facts):\n"
        "    with self.engine.gathered(): now = {k: v.clone() for k, v in self.engine.unwrapped().state_dict().items()}\n"
        "    assert saved and all(torch.equal(now[k], v) for k, v in saved.items()), 'the update happened'\n"
        "    told(self, *facts)\n"
        "step_log.StepLog._not_finite = checking\n"
    )
    more = ["track.kind=none", f"train.deepspeed={settings}"]
    codes = [zygote.wait(p) for p in zygote.start(pipeline.clipcap(run, *more), log, processes=2, before=before)]
    assert codes == [2, 2], log.read_text()[-3000:]
    assert "gradient norm is not finite at step 2" in log.read_text()


@ZERO
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_failed_write_of_one_process_stops_all_at_the_same_step(zygote, tmp_path, victim):
    run, log = tmp_path / "run", tmp_path / "log"
    before = (
        "import os\nfrom mmkit.distributed import snapshot\nwrite = snapshot.StateFile.write\n"
        "def failing(self, folder):\n"
        f"    if folder.name == '.step-00000040' and os.environ['RANK'] == '{victim}': raise OSError(28, 'full')\n"
        "    write(self, folder)\n"
        "snapshot.StateFile.write = failing\n"
    )
    more = ["train.steps=4000", "train.checkpoint_every=20", "track.kind=none", zero2()]
    codes = [zygote.wait(p) for p in zygote.start(pipeline.superclass(run, *more), log, processes=2, before=before)]
    text = log.read_text()
    assert codes == [2, 2] and "Traceback" not in text, text[-3000:]
    assert (
        text.count("the checkpoint of step 40 cannot be written (No space left on device); the checkpoint of step 20 is whole")
        == 1
    )
    assert checkpoints(run) == ["step-00000020"]
    # The others hear of it with the next step, not at the next save.
    assert 40 <= pipeline.rows(run / "metrics.jsonl")[-1]["step"] < 60


@ZERO
@pytest.mark.slow
def test_a_product_that_cannot_be_saved_ends_all_processes_alike(zygote, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    before = (
        "from mmkit import files\n"
        "made = files._new_folder\n"
        "def full(path):\n"
        "    if path.name == 'model': raise OSError(28, 'full')\n"
        "    return made(path)\n"
        "files._new_folder = full\n"
    )
    arguments = pipeline.superclass(run, *SIX)
    codes = [zygote.wait(p) for p in zygote.start(arguments, log, processes=2, before=before)]
    assert codes == [2, 2] and log.read_text().count(f"{run}/model: cannot be written (No space left on device)") == 1
    # Another number of processes goes on: all steps are done, only the product is missing.
    codes = [zygote.wait(p) for p in zygote.start(arguments, log)]
    assert codes == [0] and pipeline.manifest(run)["status"] == "done"
    assert "going on from the checkpoint at step 6 of 6" in log.read_text()


@ZERO
@pytest.mark.slow
def test_a_second_start_of_a_run_is_refused(zygote, tmp_path):
    run, log, second = tmp_path / "run", tmp_path / "log", tmp_path / "second"
    more = ["train.steps=100000", "train.checkpoint_every=2", "train.keep_checkpoints=9", "track.kind=none"]
    arguments = pipeline.superclass(run, *more)
    pids = zygote.start(arguments, log, processes=2)
    wait_for(run / "checkpoints" / "step-00000002")
    codes = [zygote.wait(p) for p in zygote.start(arguments, second, processes=2)]
    assert codes == [2, 2]
    assert second.read_text().count(f"mmkit: {run}: process {pids[0]} on ") == 1
    assert zygote.kill(pids) == [-9, -9]
    # A lock that a killed process held is no obstacle.
    newest = max(checkpoints(run))
    (one,) = zygote.start(arguments, second)
    wait_for(run / "checkpoints" / f"step-{int(newest[5:]) + 4:08d}")
    os.kill(one, signal.SIGTERM)
    assert zygote.wait(one) == 75, second.read_text()
