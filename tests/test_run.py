"""Run directories: start, go on, return at once, refuse; metrics, left-out samples and lineage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_disk import fill

import mmkit
from mmkit.config import Recipe, check_recipe
from mmkit.data.skipped import LeftOut
from mmkit.errors import InputError
from mmkit.files import write_json
from mmkit.run import Parent, Run, append_jsonl, git_commit, hardware, package_versions, read_jsonl, resolve_parent, system_of

PARENT = Parent("encoder", "runs/a", "0123456789abcdef")


def recipe(path: Path, **more: Any) -> Recipe:
    plain = {
        "stage": "clipcap",
        "run": str(path),
        "system": "SuperClass",
        "encoder": "runs/a",
        "llm": {"name": "gpt2"},
        "data": {"train": "c.json"},
        "train": {"batch_size": 8, "steps": 4, "lr": 0.001, **more},
    }
    return check_recipe(plain, where="test")


def begin(path: Path, state: str = "new", **more: Any) -> Run:
    run = Run(path)
    run.start(recipe(path, **more), [PARENT], state=state, data_fingerprint="d4ta", kind="train")  # type: ignore[arg-type]
    return run


def test_new_then_continue_then_done(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = Run(path)
    assert run.state(recipe(path), [PARENT]) == "new"
    assert not path.exists(), "asking must not write"
    path.mkdir()
    assert run.state(recipe(path), [PARENT]) == "new"
    run = begin(path)
    assert Run(path).state(recipe(path), [PARENT]) == "continue"
    run.finish("stopped")
    assert Run(path).state(recipe(path), [PARENT]) == "continue"
    run.finish("done")
    assert Run(path).state(recipe(path), [PARENT]) == "done"


def test_manifest_holds_what_a_report_needs(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.note(parameters=12)
    run.model.mkdir()
    (run.model / "weights").write_text("w")
    run.finish("done")
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert (manifest["status"], manifest["kind"], manifest["stage"]) == ("done", "train", "clipcap")
    assert (manifest["system"], manifest["mmkit"]) == ("SuperClass", mmkit.__version__)
    assert manifest["parents"] == [{"role": "encoder", "path": "runs/a", "fingerprint": PARENT.fingerprint}]
    assert manifest["data"] == {"fingerprint": "d4ta"}
    assert manifest["parameters"] == 12
    assert (manifest["skipped"], manifest["seconds"] >= 0) == (0, True)
    assert manifest["packages"]["torch"] != "absent"
    assert len(manifest["product"]) == 32
    assert resolve_parent("encoder", str(run.path)) == Parent("encoder", str(run.path), manifest["product"], run.model)


def test_changed_recipe_is_refused_with_the_diff(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    with pytest.raises(InputError) as caught:
        run.state(recipe(run.path, lr=0.5, steps=9), [PARENT])
    message = str(caught.value)
    assert all(part in message for part in ("train.steps: 4 -> 9; train.lr: 0.001 -> 0.5", "--restart"))
    assert "batch_size" not in message
    assert "\n" not in message


def test_changed_parent_is_refused(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.finish("done")
    other = Parent("encoder", "runs/a", "ffff456789abcdef")
    with pytest.raises(InputError, match=r"its encoder runs/a has changed since \(01234567 -> ffff4567\)"):
        run.state(recipe(run.path), [other])
    assert run.state(recipe(run.path), [other], restart=True) == "new"


def test_restart_empties_the_folder(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.log({"step": 1, "loss": 2.0})
    run.skip([LeftOut("a", "b", "c")])
    assert run.state(recipe(run.path, lr=0.5), [PARENT], restart=True) == "new"
    again = begin(run.path, lr=0.5)
    assert sorted(p.name for p in again.path.iterdir()) == [".lock", "manifest.json", "recipe.yaml"]
    assert again.skipped == 0


@pytest.mark.parametrize("restart", [False, True])
def test_folder_of_somebody_else_is_never_touched(tmp_path: Path, restart: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not empty and no run"):
        Run(tmp_path).state(recipe(tmp_path), [PARENT], restart=restart)
    with pytest.raises(InputError, match="is a file"):
        Run(tmp_path / "thesis.tex").state(recipe(tmp_path), [PARENT], restart=restart)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_start_killed_before_the_manifest_is_new(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    (run.path / "manifest.json").unlink()
    assert run.state(recipe(run.path), [PARENT]) == "new"


@pytest.mark.parametrize("left", [[".lock"], [".lock", ".recipe.yaml.x1"], []])
def test_start_killed_before_the_recipe_is_new(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / name).write_text("")
    run = Run(tmp_path)
    assert run.state(recipe(tmp_path), [PARENT]) == "new"
    run = begin(tmp_path)
    assert sorted(p.name for p in run.path.iterdir()) == [".lock", "manifest.json", "recipe.yaml"]


def test_a_restart_killed_half_way_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(tmp_path / "run")
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    (run.path / "wandb").mkdir()
    run.unlock()

    class Killed(BaseException):
        pass

    def die(path: Path) -> None:
        raise Killed

    # Whatever goes first, the manifest has gone before it: half of the old run is never gone on with.
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", die)
        with pytest.raises(Killed):
            begin(run.path)
    assert not (run.path / "manifest.json").exists() and (run.path / "recipe.yaml").exists()
    assert Run(run.path).state(recipe(run.path), [PARENT]) == "new"


def test_what_a_kill_left_half_written_goes(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    (run.path / ".model.ab12").mkdir()
    (run.path / ".model.ab12" / "model.safetensors").write_text("half a product")
    (run.path / ".manifest.json.cd34").write_text("{")
    (run.path / "notes.txt").write_text("the user's")
    begin(run.path, "continue")
    assert sorted(p.name for p in run.path.iterdir()) == [".lock", "manifest.json", "notes.txt", "recipe.yaml"]


HOLD = "import sys, time; from pathlib import Path; from mmkit.lock import FolderLock\nlock = FolderLock(Path(sys.argv[1]))\n"
HOLD += "lock.take(); print('held', flush=True); time.sleep(60)"


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.unlock()
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"run: process {holder.pid} on \S+ is at work in this run directory; wait for it"):
            begin(run.path, "continue")
        # Killed, it cannot give anything back; the system does.
        holder.kill()
    begin(run.path, "continue").finish("stopped")


def test_a_folder_made_for_the_lock_alone_goes_again(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.lock()
    assert (tmp_path / "run" / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    run.unlock()
    assert not run.path.exists()


@pytest.mark.parametrize("write", ["log", "skip", "note", "record"])
def test_a_full_disk_is_one_line(tmp_path: Path, small_disk: Path, write: str) -> None:
    run = begin(small_disk / "run")
    fill(small_disk)
    with pytest.raises(InputError, match=r"\.jsonl?: cannot be written \(No space left on device\); free some space"):
        for step in range(1000):
            if write == "log":
                run.log({"step": step, "loss": 1.0})
            elif write == "skip":
                run.skip([LeftOut("a", str(step), "b" * 100)])
            elif write == "note":
                run.note(**{f"n{step}": "x" * 100})
            else:
                run.record(f"{step}.json", "x" * 100)
    assert json.loads((run.path / "manifest.json").read_text())["status"] == "running"
    (small_disk / "filler").unlink()
    run.log({"step": 1000, "loss": 2.0})
    assert read_jsonl(run.path / "metrics.jsonl")[-1]["step"] == 1000


def test_a_read_only_disk_is_refused_at_the_start(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(InputError, match=r"run: cannot be written \(Read-only file system\); choose another place"):
        Run(small_disk / "run").lock()


def test_parents(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    with pytest.raises(InputError, match=r"not finished.*goes on from the last checkpoint"):
        resolve_parent("encoder", str(run.path))
    run.finish("done")
    with pytest.raises(InputError, match="has no model"):  # an evaluation, say
        resolve_parent("encoder", str(run.path))
    with pytest.raises(InputError, match=r"config\.json is missing"):
        resolve_parent("encoder", str(tmp_path))
    with pytest.raises(InputError, match="no such encoder"):
        resolve_parent("encoder", "vit_tiny")
    assert resolve_parent("encoder", "timm:vit_tiny").folder is None
    assert resolve_parent("llm", "gpt2") == Parent("llm", "gpt2", "gpt2")


def test_model_folder_as_parent_follows_its_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = resolve_parent("model", str(tmp_path))
    assert before.folder == tmp_path
    (tmp_path / "weights").write_text("1")
    assert resolve_parent("model", str(tmp_path)).fingerprint != before.fingerprint


def test_resume_forgets_rows_after_the_checkpoint(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    for step in (10, 20, 30):
        run.log({"step": step, "loss": 1 / 3, "samples": step * 8})
    run.log({"step": 20, "val_loss": 0.5})
    again = begin(run.path, "continue")
    again.drop_metrics_after(20)
    again.log({"step": 30, "loss": 9.0, "samples": 240})
    rows = read_jsonl(run.path / "metrics.jsonl")
    assert [(r["step"], "val_loss" in r) for r in rows] == [(10, False), (20, False), (20, True), (30, False)]
    assert rows[0] == {"step": 10, "loss": 0.333333333, "samples": 80}
    assert rows[-1]["loss"] == 9.0


def test_cut_last_line_is_dropped_and_not_written_into(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_jsonl(path, [{"n": 1}, {"n": "ü"}])
    whole = path.read_bytes()
    for end in range(len(whole)):  # a kill may cut anywhere, also inside a character
        path.write_bytes(whole[:end])
        kept = read_jsonl(path)
        assert kept == [{"n": 1}, {"n": "ü"}][: whole[:end].count(b"\n")]
        append_jsonl(path, [{"n": 3}])
        assert read_jsonl(path) == [*kept, {"n": 3}]
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_skipped_samples_are_listed_once(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    one, two = LeftOut("s.tar", "00001", "is empty"), LeftOut("s.tar", "00002", "is cut")
    run.skip([one, two, one, LeftOut("s.tar", "00001", "another reason")])
    run.skip([one])
    assert run.skipped == 2
    again = begin(run.path, "continue")
    assert again.skipped == 2
    again.skip([two, LeftOut("t.tar", "00001", "is empty")])
    rows = read_jsonl(run.path / "skipped.jsonl")
    assert [(r["source"], r["key"], r["reason"]) for r in rows] == [
        ("s.tar", "00001", "is empty"),
        ("s.tar", "00002", "is cut"),
        ("t.tar", "00001", "is empty"),
    ]
    again.finish("done")
    assert json.loads((run.path / "manifest.json").read_text())["skipped"] == 3


def test_a_row_may_stand_for_many_samples(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.skip([LeftOut("a.tar", "3", "cut off", 700), LeftOut("a.tar", "1", "bad")])
    assert run.skipped == 701
    rows = read_jsonl(run.path / "skipped.jsonl")
    assert [row.get("samples") for row in rows] == [700, None]
    assert begin(tmp_path / "run", "continue").skipped == 701


def test_names_that_are_no_unicode_can_be_listed(tmp_path: Path) -> None:
    append_jsonl(tmp_path / "s.jsonl", [{"key": "caf\udce9.jpg"}])
    assert read_jsonl(tmp_path / "s.jsonl") == [{"key": "caf\udce9.jpg"}]


def test_time_adds_up_over_starts(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    manifest = json.loads((run.path / "manifest.json").read_text())
    (run.path / "manifest.json").write_text(json.dumps({**manifest, "seconds": 100.0}))
    again = begin(run.path, "continue")
    again.finish("stopped")
    assert 100 <= json.loads((run.path / "manifest.json").read_text())["seconds"] < 105


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = Run(path, write=False)
    run.start(recipe(path), [PARENT], state="new", data_fingerprint="", kind="train")
    run.log({"step": 1})
    run.note(a=1)
    run.skip([LeftOut("a", "b", "c")])
    run.drop_metrics_after(0)
    run.finish("done")
    assert not path.exists()
    assert run.skipped == 1, "every rank counts, so that every rank stops at the limit"


def test_facts_about_the_machine() -> None:
    assert set(package_versions()) >= {"torch", "transformers", "tokenizers", "timm", "numpy", "pillow"}
    found = hardware()
    assert found["cores"] >= 1
    assert isinstance(found["gpus"], list)
    commit = git_commit()
    assert commit is None or len(commit.rstrip("+")) == 12


def test_a_lock_that_was_deleted_keeps_nobody_out_and_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmkit import lock

    folder = tmp_path / "run"
    holder = lock.FolderLock(folder)
    holder.take()
    old = (folder / lock.NAME).stat().st_ino
    real, seen = lock.fcntl.lockf, []

    def late(file: Any, how: int) -> None:
        # Its holder deletes the file after it was opened here and before it is locked.
        if not seen:
            seen.append(1)
            (folder / lock.NAME).unlink()
            holder.give_back()
        real(file, how)

    monkeypatch.setattr(lock.fcntl, "lockf", late)
    second = lock.FolderLock(folder)
    second.take()
    # What it holds is the file that others will find.
    assert (folder / lock.NAME).read_text().startswith(f"process {os.getpid()} on ")
    assert second._file is not None and os.fstat(second._file.fileno()).st_ino == (folder / lock.NAME).stat().st_ino
    assert old and seen


@pytest.mark.parametrize(
    ("own", "parents", "blind", "label"),
    [
        ("mine", ["SuperClass"], False, "mine"),
        ("mine", ["SuperClass"], True, "mine"),
        (None, ["SuperClass"], False, "SuperClass"),
        (None, ["SuperClass"], True, "SuperClass, blind"),
        (None, [], True, None),
    ],
)
def test_a_run_is_named_after_what_it_is_made_from(own: str | None, parents: list[str], blind: bool, label: str | None) -> None:
    task = {"task": "coco-caption", "annotations": "a.json"}
    plain = {"stage": "eval", "run": "r", "model": "m", "system": own, "blind": blind, "tasks": [task]}
    made_from = [Parent("llm", "gpt2", "gpt2", system="gpt2"), *(Parent("model", "m", "f", system=name) for name in parents)]
    assert system_of(check_recipe(plain, where="test"), made_from) == label


def test_an_encoder_is_not_named_after_the_weights_it_began_with() -> None:
    plain = {
        "stage": "superclass",
        "run": "r",
        "encoder": {"architecture": "vit_tiny_patch16_224", "init": "open_clip:ViT-B-16:laion2b"},
        "data": {"train": "pairs.jsonl"},
        "train": {"batch_size": 8, "steps": 4, "lr": 0.001},
    }
    made_from = [Parent("encoder", "open_clip:ViT-B-16:laion2b", "f", system="open_clip:ViT-B-16:laion2b")]
    assert system_of(check_recipe(plain, where="test"), made_from) is None


def test_what_no_run_made_is_named_after_itself(tmp_path: Path) -> None:
    assert resolve_parent("encoder", "timm:vit_tiny_patch16_224").system == "timm:vit_tiny_patch16_224"
    (tmp_path / "my-llava").mkdir()
    (tmp_path / "my-llava" / "config.json").write_text("{}")
    assert resolve_parent("model", str(tmp_path / "my-llava")).system == "my-llava"
    run = begin(tmp_path / "run")
    (run.path / "model").mkdir()
    run.finish("done")
    assert resolve_parent("encoder", str(run.path)).system == "SuperClass"
    write_json(run.path / "manifest.json", {**run.manifest, "system": None})
    assert resolve_parent("encoder", str(run.path)).system == "run"
