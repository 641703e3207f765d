"""training/pipeline.sh for real, on a very small world: stopped, killed, run again, and the same report in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "train.steps=6",
    "train.batch_size=8",
    "train.warmup=0",
    "train.log_every=1",
    "data.workers=0",
    "train.checkpoint_every=2",
]
# What the report says of the models. The rest of it names folders, whose hash is in a model's fingerprint, and clocks.
SAID = ("summary", "systems", "differences", "not_compared", "probes", "curves", "gallery", "skipped", "notes")
OF_THE_RUN = {"speed", "model_fingerprint", "Model"}
# Two dozen starts of Python: minutes where the machine has other things to do.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def start(demo: Path) -> subprocess.Popen[bytes]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    fixed = {"SCALE": "demo", "MMKIT_DEMO": str(demo), "WORLD": "--train 40 --heldout 8", "SYSTEMS": "superclass", "BLIND": "0"}
    # Answers are made in each folder, not taken over from the one before.
    fixed["MMKIT_CACHE"] = str(demo / "cache")
    fixed |= {"PYTHONPATH": path, "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    # The mark by which all of it is found and killed, whatever session it is in.
    fixed |= {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "MMKIT_TEST": str(demo)}
    demo.mkdir(parents=True, exist_ok=True)
    with (demo / "log").open("ab") as log:
        command = ["bash", str(ROOT / "training/pipeline.sh"), *TINY]
        return subprocess.Popen(command, env={**kept, **fixed}, cwd=demo, stdout=log, stderr=log)


def log_of(demo: Path) -> str:
    return (demo / "log").read_text(errors="replace")[-3000:]


def until(true: Callable[[], bool], process: subprocess.Popen[bytes], demo: Path) -> None:
    deadline = time.monotonic() + 600
    while not true():
        assert process.poll() is None and time.monotonic() < deadline, log_of(demo)
        time.sleep(0.01)


def finish(demo: Path) -> dict[str, Any]:
    assert start(demo).wait(900) == 0, log_of(demo)
    found: dict[str, Any] = json.loads((demo / "report" / "report.json").read_text(encoding="utf-8"))
    return found


def plain(value: Any, demo: Path) -> Any:
    """A report without its folder and without what depends on folder and clock."""
    if isinstance(value, dict):
        return {k: plain(v, demo) for k, v in value.items() if k not in OF_THE_RUN}
    if isinstance(value, list):
        return [plain(v, demo) for v in value]
    return value.replace(str(demo), "DEMO") if isinstance(value, str) else value


def processes_of(mark: Path) -> list[int]:
    """Living processes of a pipeline, its launchers' sessions among them, by what stands in their environment."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                environment = (place / "environ").read_bytes()
                state = (place / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if f"MMKIT_TEST={mark}".encode() in environment.split(b"\0") and state != "Z":
                found.append(int(place.name))
    return found


def kill(mark: Path) -> None:
    for pid in processes_of(mark):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two demo folders; no process in them outlives the test."""
    made = tmp_path / "straight", tmp_path / "broken"
    yield made
    for folder in made:
        kill(folder)


def test_stopped_and_killed_it_ends_with_the_same_report(folders: tuple[Path, Path]) -> None:
    straight, broken = folders
    whole = finish(straight)

    # Stopped in its first training stage: 75, after a checkpoint.
    process = start(broken)
    metrics = broken / "superclass/encoder/metrics.jsonl"
    until(lambda: metrics.exists() and metrics.stat().st_size > 0, process, broken)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 75, log_of(broken)
    manifest = json.loads((broken / "superclass/encoder/manifest.json").read_text())
    assert manifest["status"] == "stopped" and any((broken / "superclass/encoder/checkpoints").iterdir())

    # Killed in a later one, all of it at once.
    process = start(broken)
    metrics = broken / "superclass/llava-align/metrics.jsonl"
    until(lambda: metrics.exists() and metrics.stat().st_size > 0, process, broken)
    kill(broken)
    assert process.wait(300) == -signal.SIGKILL
    assert not (broken / "superclass/llava-finetune").exists()

    # What was finished by then is not touched again.
    finished = [broken / "superclass" / name / "manifest.json" for name in ("encoder", "probe", "clipcap")]
    before = [path.stat().st_mtime_ns for path in finished]
    again = finish(broken)
    assert [path.stat().st_mtime_ns for path in finished] == before
    for part in SAID:
        assert plain(again[part], broken) == plain(whole[part], straight), part
    assert len(again["systems"]) == 2 and len(again["runs"]) == 8
