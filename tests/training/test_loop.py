from __future__ import annotations

import types

import numpy as np
import pipeline
import pytest
import torch

from mmkit.config import TrainConfig
from mmkit.data.layout import Layout
from mmkit.data.order import make_order
from mmkit.data.skipped import SampleError
from mmkit.distributed.engine import Engine
from mmkit.errors import InputError
from mmkit.run import Run
from mmkit.training import step_log
from mmkit.training.loop import train
from mmkit.training.objective import Finding, Objective, Stage
from mmkit.training.step_log import Launched, LoopSettings, Readback, check_skipped
from mmkit.training.track import NoTracker
from mmkit.training.validation import validate


class Numbers:
    """Samples that are numbers; those in ``bad`` cannot be used."""

    def __init__(self, values: list[float], bad: tuple[int, ...] = ()) -> None:
        self.values, self.bad = values, bad

    def __len__(self) -> int:
        return len(self.values)

    def describe(self, index: int) -> tuple[str, str]:
        return "numbers", str(index)

    def load(self, index: int, rng: np.random.Generator) -> float:
        if index in self.bad:
            raise SampleError("bad number")
        return self.values[index]


class Squares(Objective):
    """Sum of (w x - 1)^2 over the batch; counts and modes are noted."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1, 1))
        self.seen: list[list[float]] = []
        self.modes: list[bool] = []
        self.absorbed = 0

    def forward(self, batch):
        self.modes.append(self.training)
        if self.training:
            self.seen.append(batch["x"].tolist())
        return ((self.w * batch["x"] - 1) ** 2).sum()

    def count(self, batch) -> int:
        return len(batch["x"])

    def statistics(self, batches):
        return torch.tensor([sum(len(b["x"]) for b in batches)])

    def absorb(self, total) -> None:
        self.absorbed += int(total())

    def evaluate(self, batch):
        return {"sum": float(batch["x"].sum())}


def collate(samples: list[float]):
    return {"x": torch.tensor(samples), "keys": [f"n{s:g}" for s in samples]}


def stage(values: list[float], *, bad: tuple[int, ...] = (), validation: list[float] | None = None) -> Stage:
    return Stage(
        objective=Squares(),
        samples=Numbers(values, bad),
        collate=collate,
        save_product=lambda folder: None,
        parents=[],
        data_fingerprint="numbers",
        validation=Numbers(validation) if validation else None,
    )


def run_loop(made: Stage, folder, *, max_skipped: float = 0.0, tracker=None, **config) -> Run:
    settings = TrainConfig(**{"batch_size": 4, "steps": 4, "lr": 0.1, "precision": "fp32", "log_every": 1, **config})
    engine = Engine(precision="fp32", deepspeed=None, batch_size=4, micro_batch_size=config.get("micro_batch_size"), clip=None)
    run = Run(folder)
    folder.mkdir()
    try:
        opened = None if tracker is None else lambda start: tracker
        train(made, engine, run, settings, LoopSettings(seed=3, workers=0, max_skipped=max_skipped, title="numbers"), opened)
    finally:
        engine.close()
    return run


VALUES = [float(i) for i in range(10)]


@pytest.mark.parametrize("wanted", [True, False])
def test_compile_compiles_the_objective(tmp_path, monkeypatch, wanted):
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    made = stage(VALUES)
    run_loop(made, tmp_path / "run", compile=wanted)
    assert compiled == ([made.objective] if wanted else [])


def test_batches_follow_the_order_and_statistics_come_first(tmp_path):
    made = stage(VALUES)
    run_loop(made, tmp_path / "run", micro_batch_size=2)
    order = [float(p.index) for p in make_order(Layout.flat(10), 3).positions(0, 16)]
    assert [x for batch in made.objective.seen for x in batch] == order
    assert [len(batch) for batch in made.objective.seen] == [2] * 8 and made.objective.absorbed == 16


def test_the_logged_loss_is_the_mean_over_the_global_batch(tmp_path):
    run = run_loop(stage(VALUES), tmp_path / "run", micro_batch_size=2)
    rows = pipeline.rows(run.path / "metrics.jsonl")
    assert rows[0]["loss"] == 1.0  # w is 0
    first = torch.tensor([float(p.index) for p in make_order(Layout.flat(10), 3).positions(0, 4)])
    # d/dw of mean (w x - 1)^2 at w = 0 is -2 mean(x).
    assert rows[0]["grad_norm"] == pytest.approx(2 * float(first.mean()), rel=1e-5)
    assert [r["lr"] for r in rows] == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447], rel=1e-5)


def test_log_every_and_the_last_step(tmp_path):
    run = run_loop(stage(VALUES), tmp_path / "run", steps=5, log_every=2)
    assert [(r["step"], r["samples"]) for r in pipeline.rows(run.path / "metrics.jsonl")] == [(2, 8), (4, 16), (5, 20)]


def test_validation_is_a_mean_over_all_samples_and_training_mode_comes_back(tmp_path):
    made = stage(VALUES, validation=[1.0, 2.0, 6.0])
    run = run_loop(made, tmp_path / "run", val_every=2, lr=1e-12)
    rows = [r for r in pipeline.rows(run.path / "metrics.jsonl") if "val_loss" in r]
    assert [r["step"] for r in rows] == [2, 4]
    assert rows[0]["val_loss"] == pytest.approx(1.0) and rows[0]["val_sum"] == pytest.approx(3.0)
    assert made.objective.modes == [True, True, False, True, True, False]


def test_every_rank_makes_the_same_number_of_validation_passes():
    # Rank 0 has the first and third group of five samples and rank 1 the second: two passes and one, and ZeRO-3 would hang.
    passes, counts = [], []
    for rank in (0, 1):
        made = stage(VALUES, validation=[1.0, 2.0, 3.0, 4.0, 5.0])
        totals: list[torch.Tensor] = []
        engine = types.SimpleNamespace(
            rank=rank, world_size=2, micro_batch_size=2, device=torch.device("cpu"), autocast=torch.no_grad,
            sum=lambda tensor, totals=totals: totals.append(tensor) or tensor,
        )  # fmt: skip
        validate(made, engine, TrainConfig(batch_size=8, steps=1, lr=1.0), 0)
        passes.append(len(made.objective.modes))
        counts.append(totals[0].tolist())
    assert passes == [2, 2]
    assert counts == [[3.0, 8.0, 3.0], [2.0, 7.0, 2.0]]  # loss (w = 0), sum of x, samples


def test_a_stage_may_fix_the_group_of_validation_samples(tmp_path):
    groups = []
    for micro in (1, 4):
        made = stage(VALUES, validation=[1.0, 2.0, 6.0, 3.0])
        made.validation_group = 3
        seen: list[list[float]] = []
        evaluate = made.objective.evaluate
        made.objective.evaluate = lambda batch, seen=seen, evaluate=evaluate: seen.append(batch["x"].tolist()) or evaluate(batch)
        run_loop(made, tmp_path / str(micro), val_every=4, micro_batch_size=micro)
        groups.append(seen)
    assert groups[0] == groups[1] == [[1.0, 2.0, 6.0], [3.0]]


def test_bad_samples_are_replaced_counted_once_and_limited(tmp_path):
    made = stage(VALUES, bad=(2, 7))
    run = run_loop(made, tmp_path / "run", max_skipped=0.2, steps=10)
    assert sorted(row["key"] for row in pipeline.rows(run.path / "skipped.jsonl")) == ["2", "7"] and run.skipped == 2
    assert all(x not in (2.0, 7.0) for batch in made.objective.seen for x in batch)
    assert {len(batch) for batch in made.objective.seen} == {4}
    with pytest.raises(InputError, match=r"2 of 10 samples cannot be used, over the limit of 10\.00%"):
        run_loop(stage(VALUES, bad=(2, 7)), tmp_path / "strict", max_skipped=0.1, steps=10)


def test_nothing_usable_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"data\.train: 50 samples in a row cannot be used, the last: numbers \d: bad number"):
        run_loop(stage(VALUES, bad=tuple(range(10))), tmp_path / "run", max_skipped=1.0)


def test_not_finite_names_the_samples(tmp_path):
    with pytest.raises(InputError, match=r"loss is not finite at step 1 \(samples: n\w+, n\w+, n\w+, n\w+\)"):
        run_loop(stage([float("nan")] * 10), tmp_path / "run")


def test_one_bad_sample_is_always_allowed():
    check_skipped(1, 5, 0.0, where="x")
    with pytest.raises(InputError):
        check_skipped(2, 5, 0.0, where="x")
    check_skipped(10, 1000, 0.01, where="x")


@pytest.mark.parametrize("in_flight", [0, 1])
def test_a_broken_step_leaves_the_weights_of_the_step_before(tmp_path, monkeypatch, in_flight):
    # As on a GPU, where the host hears of a step while the next one runs: that one must not be an update either.
    init = step_log.Readback.__init__
    monkeypatch.setattr(step_log.Readback, "__init__", lambda self, device: init(self, device, in_flight=in_flight))
    order = [p.index for p in make_order(Layout.flat(10), 3).positions(0, 16)]
    values = list(VALUES)
    fine = stage(list(VALUES))
    run_loop(fine, tmp_path / "fine", schedule="constant", steps=2)
    values[order[8]] = float("nan")  # a sample of the third step
    assert order[8] not in order[:8]
    made = stage(values)
    with pytest.raises(InputError, match="loss is not finite at step 3"):
        run_loop(made, tmp_path / "run", schedule="constant")
    assert torch.equal(made.objective.w, fine.objective.w)
    assert [r["step"] for r in pipeline.rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_step_in_flight_changes_no_number(tmp_path, monkeypatch):
    rows = []
    for in_flight in (0, 1):
        init = step_log.Readback.__init__
        with monkeypatch.context() as patch:
            patch.setattr(
                step_log.Readback, "__init__", lambda self, device, n=in_flight, init=init: init(self, device, in_flight=n)
            )
            more = {"steps": 7, "log_every": 2, "val_every": 3, "checkpoint_every": 3, "max_skipped": 0.5}
            run = run_loop(stage(VALUES, bad=(2,), validation=[1.0]), tmp_path / str(in_flight), **more)
        timeless = ("seconds", "samples_per_second", "tokens_per_second", "data_wait", "memory_gib")
        timeless += ("save_stall_seconds", "save_write_seconds")
        found = [{k: v for k, v in row.items() if k not in timeless} for row in pipeline.rows(run.path / "metrics.jsonl")]
        rows.append(sorted(found, key=lambda r: (r["step"], len(r))))
    assert rows[0] == rows[1] and len(rows[0]) == 4 + 3


def test_readback_keeps_the_order():
    readback = Readback(torch.device("cpu"), in_flight=1)
    steps = [Launched(i, 1.0, 0.0, [], []) for i in (1, 2, 3)]
    seen = []
    for number, launched in enumerate(steps):
        readback.push(torch.tensor([float(number)]), launched)
        seen.append([values[0] for values, _ in readback.ready(everything=False)])
    assert seen == [[], [0.0], [1.0]] and [v for v, _ in readback.ready(everything=True)] == [[2.0]]


class Watch:
    """A monitor that notes when it looks and in which mode."""

    every = 2

    def __init__(self, objective: Squares) -> None:
        self.objective, self.modes = objective, []

    def look(self, engine):
        self.modes.append(self.objective.training)
        return Finding(numbers={"watched": float(self.objective.w)}, pictures={"w": np.zeros((2, 3, 3), np.uint8)})


class Note(NoTracker):
    """A tracker that notes what it is shown."""

    def __init__(self) -> None:
        self.rows, self.shown, self.closed = [], [], False

    def scalars(self, step, numbers):
        self.rows.append((step, sorted(numbers)))

    def picture(self, step, name, picture):
        self.shown.append((step, name, picture.shape))

    def close(self):
        self.closed = True


def test_monitors_look_in_eval_mode_and_the_tracker_shows_it(tmp_path):
    made, note = stage(VALUES), Note()
    made.monitors.append(Watch(made.objective))
    run = run_loop(made, tmp_path / "run", steps=5, log_every=5, tracker=note)
    assert made.monitors[0].modes == [False] * 3  # after 2, 4 and the last step
    assert [r["step"] for r in pipeline.rows(run.path / "metrics.jsonl") if "watched" in r] == [2, 4, 5]
    assert note.shown == [(step, "w", (2, 3, 3)) for step in (2, 4, 5)] and note.closed
    assert [step for step, names in note.rows if "loss" in names] == [5] and made.objective.training


def test_the_speed_of_training_has_no_looking_in_it(tmp_path, monkeypatch):
    # A clock on which nothing takes time but looking.
    clock = [0.0]
    monkeypatch.setattr(step_log.time, "monotonic", lambda: clock[0])
    made = stage(VALUES)
    watch = Watch(made.objective)
    look = watch.look

    def slow(engine):
        clock[0] += 100.0
        return look(engine)

    watch.look = slow
    made.monitors.append(watch)
    run = run_loop(made, tmp_path / "run", steps=6, log_every=3)
    logged = [row for row in pipeline.rows(run.path / "metrics.jsonl") if "loss" in row]
    assert len(watch.modes) == 3 and [row["seconds"] for row in logged] == [0.0, 0.0]
