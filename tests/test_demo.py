"""The demo's plan: which stages run for which systems, and when the report is made again; stages have tests of their own."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

from mmkit import demo


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, Any]]:
    """Runs the demo with every stage replaced by a note of its recipe."""
    calls: list[tuple[str, Any]] = []

    def noted(kind: str):
        def call(recipe: Any, *more: Any, **options: Any) -> Any:
            calls.append((kind, recipe))
            return types.SimpleNamespace(path=Path(recipe.run))

        return call

    def report(runs: list[Path], out: Path, *, title: str) -> Path:
        calls.append(("report", runs))
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.html").write_text(title)
        return out / "report.html"

    monkeypatch.setattr(demo, "make_world", lambda out: {})
    monkeypatch.setattr(demo, "make_tokenizers", lambda out: None)
    monkeypatch.setattr(demo, "run_train", noted("train"))
    monkeypatch.setattr("mmkit.encoders.probing.run_probe", noted("probe"))
    monkeypatch.setattr("mmkit.eval.run.run_eval", noted("eval"))
    monkeypatch.setattr("mmkit.eval.report.build_report", report)
    monkeypatch.delenv("MMKIT_DEMO", raising=False)
    return calls


def recipes(calls: list[tuple[str, Any]], kind: str) -> list[Any]:
    return [recipe for name, recipe in calls if name == kind]


def test_two_systems_and_the_blind_baseline(plan, tmp_path: Path) -> None:
    assert demo.run_demo(tmp_path) == tmp_path / "report" / "report.html"
    trained = recipes(plan, "train")
    assert [r.stage for r in trained] == ["superclass"] * 2 + ["clipcap", "llava", "llava"] * 2
    assert [r.train.steps for r in trained[:2]] == [500, 0] and trained[1].data.val is None
    assert {r.system for r in trained} == {"SuperClass", "random frozen"}
    assert [r.system for r in recipes(plan, "eval") if r.blind] == [demo.BLIND] * 2
    aligned = {r.system: Path(r.model).name for r in recipes(plan, "eval") if "align only" in r.system}
    assert aligned == {"SuperClass, align only": "llava-align", "random frozen, align only": "llava-align"}
    (runs,) = recipes(plan, "report")
    assert len(runs) == len(recipes(plan, "eval")) + len(recipes(plan, "probe")) == 8 + 2
    # Every stage takes what an earlier one has made.
    made = [str(r.run) for r in trained]
    for place, recipe in enumerate(trained):
        parent = getattr(recipe, "model", None) or (recipe.encoder if isinstance(recipe.encoder, str) else None)
        assert parent is None or str(parent) in made[:place]


def test_clip_is_trained_on_the_same_samples_and_taken_the_whole_way(plan, tmp_path: Path) -> None:
    demo.run_demo(tmp_path, clip=True)
    trained = recipes(plan, "train")
    ours, theirs = trained[0], next(r for r in trained if r.stage == "clip")
    assert theirs.system == "CLIP" and theirs.loss.kind is None
    assert ours.model_dump(include={"data", "train", "seed", "encoder"}) == theirs.model_dump(
        include={"data", "train", "seed", "encoder"}
    )
    assert [r.stage for r in trained if r.system == "CLIP"] == ["clip", "clipcap", "llava", "llava"]
    assert len(recipes(plan, "report")[0]) == 11 + 3


def test_a_finished_demo_returns_at_once_until_something_changes(plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo.run_demo(tmp_path)
    count = len(plan)
    demo.run_demo(tmp_path)
    assert len(plan) == count
    demo.run_demo(tmp_path, clip=True)  # another set of rows
    assert len(plan) > count
    count = len(plan)
    demo.run_demo(tmp_path, clip=True)
    assert len(plan) == count
    demo.run_demo(tmp_path, clip=True, restart=True)
    assert len(plan) > count
    count = len(plan)
    monkeypatch.setattr(demo.mmkit, "__version__", "9.9")
    demo.run_demo(tmp_path, clip=True)
    assert len(plan) > count
