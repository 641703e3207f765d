"""An evaluation that is killed over and over ends with the answers of one that was left alone, byte for byte."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path

import pipeline
import pytest
import torch
from zygote import Zygote

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed on CPUs and CUDA do not mix in one environment"),
]
MINUTE = 60
# A batch takes long enough to be killed in; each leaves a mark of how many questions it asked.
SLOW = """
import time
from mmkit.eval.batches import Batches
answer = Batches.answer
def slowly(self, batch, *, following):
    found = answer(self, batch, following=following)
    time.sleep(SECONDS)
    with open(PATH, "a") as notes:
        notes.write(f"{len(batch)}\\n")
    return found
Batches.answer = slowly
"""
# SIGKILL at a chosen moment of the end, when the files are written.
AT = """
import os, signal
import mmkit.eval.run as module
work = module.NAME
def killed(*arguments, **more):
    if not AFTER:
        os.kill(os.getpid(), signal.SIGKILL)
    work(*arguments, **more)
    os.kill(os.getpid(), signal.SIGKILL)
module.NAME = killed
"""


def words(run: Path, *more: str) -> list[str]:
    size = ["tasks.0.generation.batch_size=2", "tasks.1.generation.batch_size=2"]
    fresh = ["tasks.0.generation.reuse=false", "tasks.1.generation.reuse=false"]
    return ["eval", "demo-eval-mllm", f"run={run}", f"model={pipeline.trained('finetune')}", *size, *fresh, *more]


def product(run: Path) -> tuple[bytes, dict]:
    """Predictions as they are; scores without their speed, which no two runs share."""
    found = json.loads((run / "scores.json").read_text())
    for task in found["tasks"].values():
        task["settings"].pop("speed")
    return (run / "predictions.jsonl").read_bytes(), found


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[bytes, dict]:
    """The product of a run that nothing happened to."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert pipeline.mmkit(*words(run)) == 0
    return product(run)


def slow(notes: Path, seconds: float) -> str:
    return f"PATH, SECONDS = {str(notes)!r}, {seconds}\n" + SLOW


def asked(notes: Path) -> int:
    return sum(map(int, notes.read_text().split())) if notes.exists() else 0


def until(true, text, seconds: float = MINUTE) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, text()
        time.sleep(0.01)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(zygote: Zygote, tmp_path, alone, seed):
    run, log, notes = tmp_path / "run", tmp_path / "log", tmp_path / "notes"
    rng = random.Random(seed)
    kills = 0
    while True:
        before = asked(notes)
        (pid,) = zygote.start(words(run), log, before=slow(notes, 0.03))
        # A kill is only of interest where something was done: from the first batch on.
        until(lambda: asked(notes) > before or not Path(f"/proc/{pid}/fd").exists() or not _runs(pid), log.read_text)  # noqa: B023
        if kills < 6:
            time.sleep(rng.uniform(0, 0.4))
        if kills < 6 and _runs(pid):
            zygote.kill([pid])
            kills += 1
            continue
        assert zygote.wait(pid) == 0, log.read_text()[-3000:]
        break
    assert kills >= 3 and product(run) == alone
    questions = alone[0].count(b"\n")
    # Asked again was at most the batch that each kill hit.
    assert questions <= asked(notes) <= questions + 2 * kills
    assert "Traceback" not in log.read_text()
    assert not list(run.glob("*part*")) and not [p for p in run.iterdir() if p.name.startswith(".") and p.name != ".lock"]


def _runs(pid: int) -> bool:
    """Whether a child is alive and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", ["write_json", "write_predictions", "remove_parts"])
def test_killed_while_the_product_is_written(zygote: Zygote, tmp_path, alone, name, after):
    run, log, notes = tmp_path / "run", tmp_path / "log", tmp_path / "notes"
    (pid,) = zygote.start(words(run), log, before=f"AFTER = {after}\n" + AT.replace("NAME", name))
    assert zygote.wait(pid) == -9, log.read_text()[-3000:]
    (pid,) = zygote.start(words(run), log, before=slow(notes, 0))
    assert zygote.wait(pid) == 0, log.read_text()[-3000:]
    assert product(run) == alone
    assert asked(notes) == 0, "all answers were there"
    assert not list(run.glob("*part*"))


def test_two_processes_killed_go_on_as_one_and_as_three(zygote: Zygote, tmp_path, alone):
    run, log, notes = tmp_path / "run", tmp_path / "log", tmp_path / "notes"
    for processes in (2, 3):
        before = asked(notes)
        pids = zygote.start(words(run), log, processes=processes, before=slow(notes, 0.1))
        until(lambda: asked(notes) >= before + 8, log.read_text)  # noqa: B023
        zygote.kill(pids)
    (pid,) = zygote.start(words(run), log, before=slow(notes, 0))
    assert zygote.wait(pid) == 0, log.read_text()[-3000:]
    assert product(run) == alone
    questions = alone[0].count(b"\n")
    assert questions <= asked(notes) <= questions + 2 * 5


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_other_with_one_line(zygote: Zygote, tmp_path, alone, victim):
    run, log, notes = tmp_path / "run", tmp_path / "log", tmp_path / "notes"
    pids = zygote.start(words(run), log, processes=2, before=slow(notes, 0.2))
    until(lambda: asked(notes) >= 6, log.read_text)
    began = time.monotonic()
    assert zygote.kill([pids[victim]]) == [-9]
    assert zygote.wait(pids[1 - victim]) == 1, log.read_text()[-3000:]
    assert time.monotonic() - began < MINUTE
    text = log.read_text()
    assert "bug in mmkit" not in text and "Traceback" not in text, text[-3000:]
    assert text.count(f"process {victim} of 2 was lost; run the same command to go on from the answers so far") == 1, text[-3000:]
    codes = [zygote.wait(pid) for pid in zygote.start(words(run), log, processes=2)]
    assert codes == [0, 0] and product(run) == alone


@pytest.mark.parametrize("told", [0, 1])
def test_a_process_that_is_told_to_stop_stops_the_other(zygote: Zygote, tmp_path, alone, told):
    run, log, notes = tmp_path / "run", tmp_path / "log", tmp_path / "notes"
    pids = zygote.start(words(run), log, processes=2, before=slow(notes, 0.1))
    until(lambda: asked(notes) >= 4, log.read_text)
    os.kill(pids[told], 15)
    assert [zygote.wait(pid) for pid in pids] == [75, 75], log.read_text()[-3000:]
    assert pipeline.manifest(run)["status"] == "stopped"
    codes = [zygote.wait(pid) for pid in zygote.start(words(run), log, processes=2, before=slow(notes, 0))]
    assert codes == [0, 0] and product(run) == alone
    assert asked(notes) == alone[0].count(b"\n"), "nothing was asked twice"


# SIGTERM when the product is there, while the other process has yet to hear of it.
LATE = """
import os, signal
import mmkit.eval.run as module
finish = module._finish
def told(*arguments):
    finish(*arguments)
    os.kill(os.getpid(), signal.SIGTERM)
module._finish = told
"""


def test_a_signal_after_the_product_is_written_does_not_undo_it(zygote: Zygote, tmp_path, alone):
    run, log = tmp_path / "run", tmp_path / "log"
    codes = [zygote.wait(pid) for pid in zygote.start(words(run), log, processes=2, before=LATE)]
    assert codes == [0, 0], log.read_text()[-3000:]
    assert pipeline.manifest(run)["status"] == "done" and product(run) == alone


# Something that only the second process finds wrong, while the main one has questions left.
ALONE = """
import os, time
from mmkit.errors import InputError
from mmkit.eval.batches import Batches
answer = Batches.answer
def refused(self, batch, *, following):
    if os.environ["RANK"] == "RANKED":
        raise InputError("question 7 alone does not fit in memory", where="generation", mend="use fewer beams")
    time.sleep(0.2)
    return answer(self, batch, following=following)
Batches.answer = refused
"""


@pytest.mark.parametrize("finder", [0, 1])
def test_what_one_process_finds_wrong_ends_both_with_its_reason(zygote: Zygote, tmp_path, alone, finder):
    run, log = tmp_path / "run", tmp_path / "log"
    began = time.monotonic()
    pids = zygote.start(words(run), log, processes=2, before=ALONE.replace("RANKED", str(finder)))
    assert [zygote.wait(pid) for pid in pids] == [2, 2], log.read_text()[-3000:]
    text = log.read_text()
    assert text.count("mmkit: generation: question 7 alone does not fit in memory; use fewer beams") == 1, text[-3000:]
    assert "was lost" not in text and "Traceback" not in text
    assert time.monotonic() - began < MINUTE / 2, "nobody waited for a goodbye that never came"
    codes = [zygote.wait(pid) for pid in zygote.start(words(run), log, processes=2)]
    assert codes == [0, 0] and product(run) == alone


def test_pictures_that_another_process_cannot_use_are_listed(zygote: Zygote, tmp_path):
    run, log, folder = tmp_path / "run", tmp_path / "log", tmp_path / "pictures"
    shutil.copytree(pipeline.root() / "world" / "images" / "heldout", folder)
    asked = json.loads((pipeline.root() / "world" / "vqa_heldout_questions.json").read_text())["questions"]
    # Every second picture is the second process's.
    broken = {path for path in folder.iterdir() if int(path.stem) in list(dict.fromkeys(q["image_id"] for q in asked))[1::2]}
    for path in broken:
        path.unlink()
    pids = zygote.start(words(run, f"tasks.0.image_root={folder}"), log, processes=2)
    assert [zygote.wait(pid) for pid in pids] == [2, 2], log.read_text()[-3000:]
    assert log.read_text().count("pictures cannot be used, over the limit of 1.00%") == 1
    listed = {Path(row["source"]) for row in pipeline.rows(run / "skipped.jsonl")}
    assert listed and listed <= broken
