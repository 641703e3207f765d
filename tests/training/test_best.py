"""Early stopping and the best step: when training ends, whose weights the product has, and what a kill changes (nothing)."""

from __future__ import annotations

import shutil
import types

import pipeline
import pytest
import torch
from test_loop import VALUES, stage

from mmkit.config import StoppingConfig, TrainConfig
from mmkit.distributed.engine import Engine
from mmkit.errors import InputError
from mmkit.run import Run
from mmkit.training import space
from mmkit.training.best import Best, Seen
from mmkit.training.checkpoint import list_checkpoints, step_of
from mmkit.training.loop import train
from mmkit.training.objective import Finding, Stage
from mmkit.training.space import check_space, checkpoint_size
from mmkit.training.step_log import LoopSettings


class Script:
    """A monitor that reads its numbers from a list, by step."""

    def __init__(self, made: Stage, values: list[float], every: int = 2, name: str = "score") -> None:
        self.every, self.values, self.name = every, values, name
        self.steps = iter(range(10**6))
        self.made, self.weights = made, {}
        self.kill_at: int | None = None
        self.done = 0

    def look(self, engine):
        step = self.step()
        if step == self.kill_at:
            raise KeyboardInterrupt
        self.weights[step] = self.made.objective.w.item()
        return Finding(numbers={self.name: self.values[step // self.every - 1]})

    def step(self) -> int:
        # Each training step has one forward pass with four numbers here.
        return self.done + len(self.made.objective.seen)


def run_stopping(folder, script_values, *, every=2, kill_at=None, start=0, name="score", **config):
    """One start of a run with a scripted monitor; returns its stage and monitor."""
    made = stage(VALUES)
    script = Script(made, script_values, every, name)
    script.kill_at, script.done = kill_at, start
    made.monitors.append(script)
    stopping = {"metric": "score", "mode": "max", "patience": 2}
    stopping.update(config.pop("stopping", {}))
    settings = {"batch_size": 4, "steps": 20, "lr": 0.01, "precision": "fp32", "log_every": 1, "schedule": "constant", **config}
    engine = Engine(precision="fp32", deepspeed=None, batch_size=4, micro_batch_size=None, clip=None)
    folder.mkdir(exist_ok=True)
    run = Run(folder)
    try:
        checked = TrainConfig(**settings, early_stopping=stopping)
        train(made, engine, run, checked, LoopSettings(seed=3, workers=0, max_skipped=0.0, title="numbers"))
    finally:
        engine.close()
    return made, script, run


def kept(folder) -> list[int]:
    return [step_of(path) for path in list_checkpoints(folder / "checkpoints")]


def rows(folder) -> list[dict]:
    timed = ("seconds", "samples_per_second", "tokens_per_second", "data_wait", "memory_gib")
    timed += ("save_stall_seconds", "save_write_seconds")
    return [{k: v for k, v in row.items() if k not in timed} for row in pipeline.rows(folder / "metrics.jsonl")]


SCORES = [0.1, 0.5, 0.4, 0.45, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]


def test_it_stops_when_patience_runs_out_and_keeps_the_best_weights(tmp_path):
    made, script, run = run_stopping(tmp_path / "run", SCORES)
    # Best after step 4; steps 6 and 8 are no better.
    assert list(script.weights) == [2, 4, 6, 8]
    assert made.objective.w.item() == script.weights[4] != script.weights[8]
    assert run.manifest["best"] == {"metric": "score", "value": 0.5, "step": 4}
    assert run.manifest["ended"] == {"step": 8, "why": "score has not risen for 2 looks"}
    assert kept(tmp_path / "run") == [4, 8] and rows(tmp_path / "run")[-1]["score"] == 0.45


def test_without_patience_all_steps_are_made_and_the_best_is_kept_from_pruning(tmp_path):
    more = {"stopping": {"patience": None}, "checkpoint_every": 1, "keep_checkpoints": 2, "steps": 8}
    made, script, run = run_stopping(tmp_path / "run", SCORES, **more)
    assert kept(tmp_path / "run") == [4, 7, 8] and made.objective.w.item() == script.weights[4]
    assert run.manifest["ended"] == {"step": 8, "why": "all steps are done"}


@pytest.mark.parametrize(("mode", "values", "best"), [("min", [3.0, 1.0, 2.0, 1.0], 4), ("max", [1.0, 1.0, 1.0, 1.0], 2)])
def test_smaller_may_be_better_and_equal_is_not(tmp_path, mode, values, best):
    _, _, run = run_stopping(tmp_path / "run", values, stopping={"mode": mode})
    assert (run.manifest["best"]["step"], run.manifest["ended"]["step"]) == (best, best + 4)


def test_the_least_gain_counts(tmp_path):
    values = [0.1, 0.15, 0.2, 0.29, 0.5, 0.5, 0.5]
    _, _, run = run_stopping(tmp_path / "run", values, stopping={"min_delta": 0.09})
    # 0.15 is too little over 0.1; 0.2 is enough; 0.29 is not, 0.5 is.
    assert run.manifest["best"]["step"] == 10 and run.manifest["ended"]["step"] == 14


@pytest.mark.parametrize("kill_at", [6, 8, 10, 12])
@pytest.mark.parametrize("checkpoint_every", [1, 3, None])
def test_a_killed_run_ends_as_one_that_was_not(tmp_path, kill_at, checkpoint_every):
    values = [0.1, 0.5, 0.4, 0.6, 0.55, 0.58]
    more = {"checkpoint_every": checkpoint_every, "stopping": {"patience": 2}}
    straight, _, one = run_stopping(tmp_path / "straight", values, **more)
    with pytest.raises(KeyboardInterrupt):
        run_stopping(tmp_path / "run", values, kill_at=kill_at, **more)
    start = kept(tmp_path / "run")[-1]
    assert start < kill_at
    made, _, two = run_stopping(tmp_path / "run", values, start=start, **more)
    assert torch.equal(made.objective.w, straight.objective.w)
    assert (two.manifest["best"], two.manifest["ended"]) == (one.manifest["best"], one.manifest["ended"])
    assert one.manifest["best"]["step"] == 8 and one.manifest["ended"]["step"] == 12
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")


def test_a_run_killed_while_it_saved_its_product_trains_no_further(tmp_path):
    first, _, _ = run_stopping(tmp_path / "run", SCORES)
    again, script, run = run_stopping(tmp_path / "run", SCORES, start=8)
    assert not again.objective.seen and not script.weights
    assert torch.equal(again.objective.w, first.objective.w) and run.manifest["ended"]["step"] == 8


def test_an_older_checkpoint_finds_its_own_best(tmp_path):
    # The newest checkpoint, which is also the best, is damaged: the run goes on from the one before, whose best is another.
    with pytest.raises(KeyboardInterrupt):
        run_stopping(tmp_path / "run", [0.5, 0.1, 0.9], kill_at=8, checkpoint_every=3, keep_checkpoints=2, steps=8)
    # Steps 3 and 6 by the clock, 2 and 6 as the best of their time: 2 is what 3 goes back to.
    assert kept(tmp_path / "run") == [2, 3, 6]
    (tmp_path / "run" / "checkpoints" / "step-00000006" / "optimizer.pt").write_bytes(b"damaged")
    _, _, run = run_stopping(tmp_path / "run", [0.5, 0.1, 0.2, 0.2], start=3, checkpoint_every=3, steps=8)
    assert run.manifest["best"]["step"] == 2


def test_a_best_checkpoint_that_is_gone_is_told_at_the_start(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_stopping(tmp_path / "run", SCORES, kill_at=8, checkpoint_every=1)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    with pytest.raises(InputError, match="the checkpoint of the best step so far, 4, is gone"):
        run_stopping(tmp_path / "run", SCORES, start=7, checkpoint_every=1)


def test_a_damaged_best_checkpoint_is_no_product(tmp_path, monkeypatch):
    save = Best.restore

    def damage(self):
        path = tmp_path / "run" / "checkpoints" / "step-00000004" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        save(self)

    monkeypatch.setattr(Best, "restore", damage)
    with pytest.raises(InputError, match=r"the best checkpoint is damaged \(model.safetensors: content differs"):
        run_stopping(tmp_path / "run", SCORES)


def test_a_number_that_nothing_gives_is_told_after_the_first_look(tmp_path):
    with pytest.raises(InputError, match=r"train\.early_stopping\.metric: no look at the model gives score; looked at: other"):
        run_stopping(tmp_path / "run", SCORES, name="other")
    assert len([r for r in rows(tmp_path / "run") if "other" in r]) == 1
    engine = types.SimpleNamespace(is_main=True, gather=lambda rows: rows)
    with pytest.raises(InputError, match=r"nothing gives score: the run has neither validation nor a monitor"):
        Best(StoppingConfig(metric="score", mode="max"), engine, Run(tmp_path / "none"), every=[])


def test_validation_loss_needs_no_monitor(tmp_path):
    made = stage(VALUES, validation=[1.0, 2.0])
    engine = Engine(precision="fp32", deepspeed=None, batch_size=4, micro_batch_size=None, clip=None)
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run")
    stopping = {"metric": "val_loss", "mode": "min", "patience": 1}
    config = TrainConfig(
        batch_size=4, steps=30, lr=0.5, schedule="constant", precision="fp32", val_every=2, early_stopping=stopping
    )
    try:
        train(made, engine, run, config, LoopSettings(seed=3, workers=0, max_skipped=0.0, title="numbers"))
    finally:
        engine.close()
    losses = [(row["step"], row["val_loss"]) for row in rows(tmp_path / "run") if "val_loss" in row]
    assert run.manifest["best"]["step"] == min(losses, key=lambda pair: pair[1])[0] < run.manifest["ended"]["step"] < 30


def test_space_for_the_best_checkpoint_is_asked_for(tmp_path, monkeypatch):
    made = stage(VALUES).objective
    each = checkpoint_size(made)
    told = []
    for stopping in (None, {"metric": "x", "mode": "max"}):
        more = {"checkpoint_every": None if stopping else 1, "keep_checkpoints": 2, "early_stopping": stopping}
        config = TrainConfig(batch_size=4, steps=20, lr=0.1, precision="fp32", **more)
        need = (4 if stopping else 3) * each + 4
        for free in (need - 1, need):
            monkeypatch.setattr(space.shutil, "disk_usage", lambda path, free=free: types.SimpleNamespace(free=free))
            try:
                check_space(made, config, tmp_path / "checkpoints", start=0, total=20)
                told.append(True)
            except InputError:
                told.append(False)
    assert told == [False, True, False, True]


def test_not_a_number_is_never_the_best():
    best = Best.__new__(Best)
    best.config = StoppingConfig(metric="x", mode="min", patience=2)
    best.seen = [Seen(1, float("nan")), Seen(2, 3.0), Seen(3, float("nan"))]
    assert best.at() == Seen(2, 3.0) and best.at(1).step == 1 and not best.over
    best.seen.append(Seen(4, float("nan")))
    assert best.over and best.protected([1, 3]) == {1, 2}
