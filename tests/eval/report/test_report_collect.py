from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_runs import score

from mmkit.errors import InputError
from mmkit.eval.report import build_report
from mmkit.eval.report.collect import collect, find_parent, read_run


def test_reads_scores_predictions_and_skips(world: list[Path]) -> None:
    run = collect(world).runs[0]
    assert (run.name, run.kind, run.system) == ("superclass-captions", "eval", "SuperClass")
    score = run.scores["coco-caption"]
    assert score.n == 15 and set(score.metrics) == {"CIDEr", "Bleu_4"} and len(score.per_sample) == 15
    assert score.ci95["CIDEr"][0] < score.metrics["CIDEr"] < score.ci95["CIDEr"][1]
    assert run.predictions[0].references[0].startswith("a red circle") and run.predictions[0].id == "0"
    assert [row["reason"] for row in run.skipped] == ["the file is empty"] * 2 + ["cut off"]
    assert run.recipe.startswith("stage: eval")


def test_ancestors_come_parents_first_and_once(world: list[Path]) -> None:
    found = collect(world)
    names = [run.name for run in found.ancestors]
    assert len(names) == len(set(names)) == 8
    assert names.index("superclass-encoder") < names.index("superclass-align") < names.index("superclass-tune")
    encoder = next(run for run in found.ancestors if run.name == "superclass-encoder")
    assert [run.name for run in found.descendants(encoder)] == [
        "superclass-captions", "superclass-vqa", "superclass-probe", "blind",
    ]  # fmt: skip


@pytest.mark.parametrize("inside", ["", "model", "checkpoints/step-00000010"])
def test_parent_may_be_a_run_its_model_or_a_checkpoint(runs, inside: str) -> None:
    parent, child = runs.train("enc", "superclass"), runs.train("cap", "clipcap")
    assert find_parent(str(parent / inside), child) == parent
    # Relative to a folder above the runs, from wherever the report is built.
    assert find_parent(str(Path("runs", "enc", inside)), child) == parent


@pytest.mark.parametrize("named", ["lmsys/vicuna-7b-v1.5", "timm:vit_base_patch16_224", "model", "", None, 3])
def test_models_from_elsewhere_are_no_run(runs, named: object) -> None:
    assert find_parent(named, runs.train("cap", "clipcap")) is None


def test_parents_in_a_circle_end(runs) -> None:
    a, b = runs.train("a", "llava"), runs.train("b", "llava")
    for one, other in ((a, b), (b, a)):
        manifest = json.loads((one / "manifest.json").read_text())
        manifest["parents"] = [{"role": "model", "path": str(other), "fingerprint": "x"}]
        (one / "manifest.json").write_text(json.dumps(manifest))
    assert [run.name for run in collect([a]).ancestors] == ["b"]


def test_an_ancestor_may_be_unfinished_a_given_run_may_not(runs) -> None:
    stopped = runs.train("enc", "superclass")
    manifest = json.loads((stopped / "manifest.json").read_text())
    (stopped / "manifest.json").write_text(json.dumps({**manifest, "status": "stopped"}))
    child = runs.train("cap", "clipcap", parents=[stopped])
    assert collect([child]).ancestors[0].manifest["status"] == "stopped"
    with pytest.raises(InputError, match=r"not done .status 'stopped'.; start the same command again"):
        collect([stopped])
    (stopped / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    with pytest.raises(InputError, match=r"not done .status 'running'.; wait for its end or, if it was killed, start the same"):
        collect([stopped])


def test_same_folder_names_are_told_apart_and_repeats_dropped(runs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = runs.train("a/enc", "superclass"), runs.train("b/enc", "superclass")
    (tmp_path / "link").symlink_to(two)
    found = collect([one, two, one, tmp_path / "link"])
    assert [run.name for run in found.runs] == ["a/enc", "b/enc"]
    # Said where the command is given and on the page.
    lines = [
        f"{one} is given twice; it counts once",
        f"{tmp_path / 'link'} and {two} are one run; it counts once",
    ]
    assert found.notes == lines == [record.getMessage() for record in caplog.records]
    page = build_report([one, one], tmp_path / "out").read_text()
    assert lines[0] in page and lines[0] in (tmp_path / "out" / "report.json").read_text()
    assert collect([one, two]).notes == []


def test_parts_of_a_run_and_folders_of_runs_name_what_to_give(runs) -> None:
    path = runs.probe("probe", "Mine", 0.9)
    for inside in ("scores.json", "manifest.json", "recipe.yaml"):
        with pytest.raises(InputError, match=f"is a file of a run, not a run; give the run directory {path}"):
            collect([path / inside])
    others = [runs.probe(f"probe{i}", "Mine", 0.9) for i in range(3)]
    with pytest.raises(InputError, match=f"name the runs in it: {path} {others[0]} {others[1]} …"):
        collect([path.parent])


def test_refusals_name_what_and_mend(runs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run directory given"):
        collect([])
    with pytest.raises(InputError, match=r"nowhere: no such file or directory; give the directory of a finished"):
        collect([tmp_path / "nowhere"])
    with pytest.raises(InputError, match=r"pictures: not a run directory \(it has no manifest.json\)"):
        collect([runs.pictures])
    with pytest.raises(InputError, match=r"manifest.json: kind is 'demo', not one of eval, probe, train"):
        collect([runs.run("demo", "demo")])
    with pytest.raises(InputError, match=r"has no scores.json"):
        collect([runs.run("eval", "eval")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"tasks": {"vqav2": {"met', "is not JSON"),
        ('{"vqav2": 1}', 'no "tasks" object'),
        ('{"tasks": {"vqav2": {"n": 3}}}', "task 'vqav2' is no score object .KeyError"),
        ('{"tasks": {"vqav2": {"metrics": {"accuracy": "high"}}}}', "task 'vqav2' is no score object .ValueError"),
        ('{"tasks": {"vqav2": [1]}}', "task 'vqav2' is no score object .AttributeError"),
    ],
)
def test_damaged_scores(runs, text: str, message: str) -> None:
    path = runs.run("eval", "eval")
    (path / "scores.json").write_text(text)
    with pytest.raises(InputError, match=message):
        collect([path])


def test_damaged_predictions_name_the_row(runs) -> None:
    path = runs.run("eval", "eval", scores={}, predictions=[{"task": "vqav2", "id": 1, "prediction": "a"}, {"id": 2}])
    with pytest.raises(InputError, match=r"predictions.jsonl: row 2 is no prediction"):
        collect([path])


def test_a_cut_last_line_is_noted_a_broken_one_refused(runs) -> None:
    path = runs.train("enc", "superclass", steps=3)
    whole = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(whole + '{"step": 4, "lo')
    run = read_run(path, need_done=True)
    assert len(run.metrics) == 4 and run.notes == ["metrics.jsonl:5: last line cut in the middle, left out"]
    (path / "metrics.jsonl").write_text('{"step": 4, "lo\n' + whole)
    with pytest.raises(InputError, match=r"metrics.jsonl:1: not valid JSON"):
        read_run(path, need_done=True)
    (path / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(InputError, match=r"metrics.jsonl:1: not a JSON object"):
        read_run(path, need_done=True)


def test_a_fine_tuned_encoder_stands_among_the_probes(runs, tmp_path: Path) -> None:
    frozen = runs.probe("frozen", "SuperClass", 0.5)
    tuned = runs.train("tuned", "finetune", system="SuperClass fine-tuned")
    (tuned / "scores.json").write_text(json.dumps({"tasks": {"finetune": score("finetune", {"accuracy": 0.75})}}))
    assert collect([frozen, tuned]).runs[1].scores["finetune"].metrics == {"accuracy": 0.75}
    build_report([frozen, tuned], tmp_path / "report", title="t")
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "finetune" in text and "75.0" in text and "50.0" in text
    # As an ancestor of another run it is only where that came from.
    assert not collect([runs.train("cap", "clipcap", parents=[tuned])]).ancestors[0].scores
