"""The launch scripts with the real launchers and two processes each, mmkit replaced by a child that leaves as it is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "training" / "launch"
# Stands for `python -m mmkit`: notes each start, then leaves by the plan: a word a start and rank, "CODE" or "hang".
CHILD = """#!/usr/bin/env bash
[ "$3" = validate ] && { echo "$*" >>"$NOTES/validate"; exit "${VALIDATE_CODE:-0}"; }
rank=${RANK:-0}
echo "$*" >>"$NOTES/rank-$rank"
turn=$(wc -l <"$NOTES/rank-$rank")
words=(${PLAN:-0})
word=${words[turn - 1]:-0}
codes=(${word//,/ })
code=${codes[rank]:-${codes[0]}}
echo "rank $rank of ${WORLD_SIZE:-1}, turn $turn, OMP_NUM_THREADS=$OMP_NUM_THREADS"
if [ "$code" = hang ]; then
  trap 'echo saved >>"$NOTES/saved"; exit 75' TERM
  echo ready >>"$NOTES/ready"
  while true; do sleep 0.1; done
fi
exit "$code"
"""
LAUNCHERS = ["torchrun.sh", "deepspeed_hostfile.sh"]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the launchers would count GPUs here")


@pytest.fixture
def start(tmp_path: Path):
    """Starts a launch script; what the child notes lies in ``notes``."""
    child, notes = tmp_path / "child", tmp_path / "notes"
    child.write_text(CHILD, encoding="utf-8")
    child.chmod(0o755)
    notes.mkdir()
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "LOGS", "NNODES")}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}"

    def run(script: str, *words: str, **environment: str) -> subprocess.Popen[str]:
        more = {"PATH": path, "PYTHON": str(child), "NOTES": str(notes), "NGPU": "2", "OMP_NUM_THREADS": "1"}
        more["DS_ACCELERATOR"] = "cpu"
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
        return subprocess.Popen(["bash", str(LAUNCH / script), *words], env={**kept, **more, **environment}, **pipes)

    return run


def notes(tmp_path: Path, name: str) -> list[str]:
    path = tmp_path / "notes" / name
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("script", LAUNCHERS)
@pytest.mark.parametrize(
    ("plan", "code"),
    [
        ("0,0", 0),
        # Both say so, and each launcher makes something else of it.
        ("75,75", 75),
        # One is wrong, the other stopped because of it: not to be requeued.
        ("75,1", 1),
        ("2,2", 2),
    ],
)
def test_the_code_is_that_of_the_ranks(start, tmp_path: Path, script: str, plan: str, code: int) -> None:
    if script.startswith("deepspeed") and plan in ("0,0", "2,2"):
        pytest.skip("the same code as for torchrun")
    out, err = (process := start(script, "train", "demo-superclass", "train.lr=1e-3", PLAN=plan)).communicate(timeout=120)
    assert process.returncode == code, (out, err)
    assert notes(tmp_path, "validate") == ["-m mmkit validate demo-superclass train.lr=1e-3"]
    assert notes(tmp_path, "rank-0") == ["-m mmkit train demo-superclass train.lr=1e-3"]
    assert len(notes(tmp_path, "rank-1")) == 1
    assert "rank 1 of 2" in out


@pytest.mark.slow
@pytest.mark.parametrize("script", LAUNCHERS)
def test_it_goes_on_by_itself_as_often_as_it_is_allowed(start, tmp_path: Path, script: str) -> None:
    process = start(script, "train", "demo-superclass", PLAN="75,75 0,0", RESTARTS="1", LOGS=str(tmp_path / "logs"))
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert len(notes(tmp_path, "rank-0")) == len(notes(tmp_path, "rank-1")) == 2
    assert len(notes(tmp_path, "validate")) == 1
    assert "going on (0 restarts left)" in err
    for rank in (0, 1):
        lines = (tmp_path / "logs" / f"rank-{rank}.log").read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if line.startswith("rank")] == [
            f"rank {rank} of 2, turn {turn}, OMP_NUM_THREADS=1" for turn in (1, 2)
        ]


@pytest.mark.slow
@pytest.mark.parametrize("script", LAUNCHERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_script_stops_the_ranks_after_their_checkpoint(start, tmp_path: Path, script: str, number: int) -> None:
    if script.startswith("deepspeed") and number != signal.SIGTERM:
        pytest.skip("the same code as for torchrun")
    process = start(script, "train", "demo-superclass", PLAN="hang,hang", RESTARTS="5")
    deadline = time.monotonic() + 120
    while len(notes(tmp_path, "ready")) < 2:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    # Told to stop, it does not go on by itself.
    assert process.returncode == 75, (out, err)
    assert len(notes(tmp_path, "rank-0")) == 1
    assert notes(tmp_path, "saved") == ["saved"] * 2


def test_one_process_needs_no_launcher(start, tmp_path: Path) -> None:
    process = start("torchrun.sh", "train", "demo-superclass", PLAN="75 2", RESTARTS="1", NGPU="1", OMP_NUM_THREADS="")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2, (out, err)
    assert f"rank 0 of 1, turn 1, OMP_NUM_THREADS={max(1, len(os.sched_getaffinity(0)))}" in out
    assert len(notes(tmp_path, "rank-0")) == 2


@pytest.mark.parametrize("script", LAUNCHERS)
def test_a_recipe_that_is_refused_takes_no_gpus(start, tmp_path: Path, script: str) -> None:
    process = start(script, "train", "demo-superclass", "train.lrr=1", VALIDATE_CODE="2")
    process.communicate(timeout=60)
    assert process.returncode == 2
    assert notes(tmp_path, "rank-0") == []
    unchecked = start("torchrun.sh", "train", "demo-superclass", VALIDATE="0", NGPU="1")
    unchecked.communicate(timeout=60)
    assert len(notes(tmp_path, "validate")) == 1 and len(notes(tmp_path, "rank-0")) == 1


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        ((), {}, "usage: torchrun.sh train|probe|eval RECIPE"),
        (("tarin", "demo-superclass"), {}, "usage"),
        (("train",), {}, "no recipe"),
        (("train", "demo-superclass"), {"NGPU": "eight"}, "eight processes"),
        (("train", "demo-superclass"), {"NGPU": "0"}, "0 processes"),
    ],
)
def test_wrong_words_are_refused(start, tmp_path: Path, words, environment, said: str) -> None:
    process = start("torchrun.sh", *words, **environment)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and said in err and err.count("\n") == 1
    assert not list((tmp_path / "notes").iterdir())


FAKE_SRUN = """#!/usr/bin/env bash
# Two tasks on one machine; leaves with the largest code, as srun does.
largest=0
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks[task]=$!; done
for task in "${tasks[@]}"; do wait "$task" && code=0 || code=$?; ((code > largest)) && largest=$code; done
exit "$largest"
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
echo "$*" >>"$NOTES/scontrol"
[ "$1" = show ] && printf 'node1\\nnode2\\n'
exit 0
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job with fake commands of Slurm in front of PATH."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_SUBMIT_DIR": str(ROOT)}
    return {**job, "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}", "RUNS": str(tmp_path / "runs")}


@pytest.mark.parametrize(
    ("plan", "code", "requeued"),
    [("0,0", 0, False), ("75,75", 75, True), ("75,143", 75, True), ("1,75", 1, False), ("2,2", 2, False)],
)
def test_slurm_requeues_after_a_checkpoint_only(start, tmp_path: Path, slurm, plan: str, code: int, requeued: bool) -> None:
    process = start("slurm.sbatch", "train", "llava-7b-align", PLAN=plan, **slurm)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, (out, err)
    assert ("requeue 7" in notes(tmp_path, "scontrol")) is requeued
    assert "rank 1 of 2, turn 1" in out
    assert not list((tmp_path / "runs" / ".launch").iterdir())


def test_slurm_leaves_the_requeueing_to_others_when_told(start, tmp_path: Path, slurm) -> None:
    process = start("slurm.sbatch", "train", "llava-7b-align", PLAN="75,75", REQUEUE="0", **slurm)
    process.communicate(timeout=60)
    assert process.returncode == 75 and "requeue 7" not in notes(tmp_path, "scontrol")


def test_slurm_is_submitted_from_the_checkout(start, tmp_path: Path, slurm) -> None:
    process = start("slurm.sbatch", "train", "llava-7b-align", **{**slurm, "SLURM_SUBMIT_DIR": str(tmp_path)})
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "LAUNCH_DIR" in err
