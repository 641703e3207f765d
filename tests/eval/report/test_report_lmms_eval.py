"""Result files of lmms-eval, in the form that version 0.7 writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_runs import Runs, lmms_results, say

from mmkit.errors import InputError
from mmkit.eval.metrics import HEADLINES, headline
from mmkit.eval.report import build_report
from mmkit.eval.report.collect import collect
from mmkit.eval.report.differences import differences
from mmkit.eval.report.lmms_eval import TASKS, read_lmms_eval
from mmkit.eval.report.systems import system_rows
from mmkit.eval.report.tables import groups_of, score_tables
from mmkit.eval.scorers.vqa import RULES
from mmkit.eval.scorers.yesno import MME_RULES, POPE_RULES

VQA = {
    "results": {"exact_match,none": 0.7652, "exact_match_stderr,none": 0.01, "exact_match_stderr_clt,none": "N/A"},
    "n": (214354, 214354),
}


def sample(doc: int, answer: object, **more: object) -> dict[str, object]:
    return {"doc_id": doc, "input": f"What is {doc}?\nShort answer.", "target": "red", "filtered_resps": answer, **more}


def test_metrics_settings_and_model(tmp_path: Path) -> None:
    run = read_lmms_eval(lmms_results(tmp_path, {"vqav2_val": VQA}))
    assert (run.kind, run.system, run.imported) == ("eval", "llava-hf/llava-1.5-7b-hf (lmms-eval)", "lmms-eval 0.7.2")
    score = run.scores["vqav2-val"]
    assert score.task == "vqav2" and score.metrics == {"accuracy": 0.7652} and score.n == 214354
    assert score.ci95["accuracy"] == pytest.approx((0.7652 - 0.0196, 0.7652 + 0.0196))
    told = score.settings
    assert told["rule"] == "always" and told["prompt"] == "{question}\nShort answer."
    assert told["evaluator"] == "lmms-eval 0.7.2" and told["lmms-eval task"] == "vqav2_val"
    assert told["data"] == "lmms-lab/vqav2_val, validation" and told["generation"]["max_new_tokens"] == 16
    assert run.notes[0].startswith("no samples of vqav2_val beside")


def test_a_clustered_error_is_preferred_and_a_limit_told(tmp_path: Path) -> None:
    task = {"results": {**VQA["results"], "exact_match_stderr_clustered,none": 0.02}, "n": (214354, 500)}
    score = read_lmms_eval(lmms_results(tmp_path, {"vqav2_val": task})).scores["vqav2-val"]
    assert score.ci95["accuracy"] == pytest.approx((0.7652 - 0.0392, 0.7652 + 0.0392))
    assert score.n == 500 and score.settings["scored"] == "500 of 214354"


@pytest.mark.parametrize(
    ("task", "results", "name", "metrics"),
    [
        ("gqa", {"exact_match,none": 0.61}, "gqa-testdev-balanced", {"accuracy": 0.61}),
        (
            "pope",
            {"pope_accuracy,none": 0.87, "pope_f1_score,none": 0.86, "pope_yes_ratio,none": 0.5, "pope_precision,none": 0.9},
            "pope",
            # One F1 over all is not the mean of three, and that yes ratio is the labels'.
            {"accuracy": 0.87, "f1_pooled": 0.86, "label_yes_ratio": 0.5, "precision": 0.9},
        ),
        ("pope_adv", {"pope_f1_score,none": 0.84}, "pope-adversarial", {"f1": 0.84}),
        (
            "mme",
            {"mme_percetion_score,none": 1500.0, "mme_cognition_score,none": 300.0},
            "mme",
            {"perception": 1500.0, "cognition": 300.0},
        ),
        ("mmbench_en_dev", {"gpt_eval_score,none": 64.3, "submission,none": None}, "mmbench-en-dev", {"accuracy": 0.643}),
        ("mmmu_val", {"mmmu_acc,none": 0.36}, "mmmu-val", {"accuracy": 0.36}),
        (
            "coco_karpathy_test",
            {"coco_CIDEr,none": 1.1, "coco_Bleu_4,none": 0.3},
            "coco-karpathy-test",
            {"CIDEr": 1.1, "Bleu_4": 0.3},
        ),
        # No suite of mmkit: its own names, and a rule that compares with none.
        ("docvqa_val", {"anls,none": 0.5, "anls,strict": 0.4}, "docvqa_val", {"anls": 0.5, "anls (strict)": 0.4}),
    ],
)
def test_tasks(tmp_path: Path, task: str, results: dict[str, object], name: str, metrics: dict[str, float]) -> None:
    run = read_lmms_eval(lmms_results(tmp_path, {task: {"results": results, "n": (10, 10)}}))
    assert list(run.scores) == [name] and run.scores[name].metrics == pytest.approx(metrics)


def test_every_task_with_another_rule_says_so() -> None:
    same = {task for task, known in TASKS.items() if not known.rule.startswith("lmms-eval")}
    assert same == {
        "coco_karpathy_test", "coco2017_cap_val", "vqav2_val", "textvqa_val",
        "pope", "pope_adv", "pope_pop", "pope_random", "mme",
    }  # fmt: skip


@pytest.mark.parametrize("task", sorted(TASKS))
def test_suites_rules_and_rows_exist_in_mmkit(task: str) -> None:
    known = TASKS[task]
    rules = {"vqav2": RULES, "textvqa": ["m4c"], "pope": POPE_RULES, "mme": MME_RULES, "coco-caption": [""]}
    if not known.rule.startswith("lmms-eval"):
        assert known.rule in rules[known.suite]
    names = set(known.metrics.values())
    assert set(headline(known.suite, dict.fromkeys(names, 0.0))) <= set(HEADLINES.get(known.suite, ("accuracy",)))


@pytest.mark.parametrize(("version", "doubtful"), [("0.7.2", True), ("0.7.3", False), ("0.8.0", False), ("main@1a2b3c4d", True)])
def test_mmmu_open_questions(tmp_path: Path, version: str, doubtful: bool) -> None:
    path = lmms_results(tmp_path, {"mmmu_val": {"results": {"mmmu_acc,none": 0.36}}}, lmms_eval_version=version)
    (score,) = read_lmms_eval(path).scores.values()
    assert any("53 open questions" in note for note in score.notes) == doubtful


@pytest.mark.parametrize(("kwargs", "name"), [({"ocr": False}, "textvqa-val"), ({"default": {"ocr": True}}, "textvqa-val-ocr")])
def test_textvqa_with_ocr_is_another_row(tmp_path: Path, kwargs: dict[str, object], name: str) -> None:
    task = {**VQA, "config": {"lmms_eval_specific_kwargs": kwargs}}
    run = read_lmms_eval(lmms_results(tmp_path, {"textvqa_val": task}))
    assert list(run.scores) == [name]
    assert run.scores[name].settings["ocr"] == ("reference" if name.endswith("ocr") else "none")


def test_samples_become_predictions(tmp_path: Path) -> None:
    samples = [
        sample(0, "Red", exact_match=1.0),
        sample(1, ["blue"], exact_match=0.0, submission={"question_id": 5}),
        sample(2, [], exact_match=0.3, target="None"),
    ]
    run = read_lmms_eval(lmms_results(tmp_path, {"vqav2_val": {**VQA, "n": (3, 3), "samples": samples}}))
    assert [(p.id, p.text, p.question, p.references) for p in run.predictions] == [
        ("vqav2_val:0", "Red", "What is 0?", ["red"]),
        ("vqav2_val:1", "blue", "What is 1?", ["red"]),
        ("vqav2_val:2", "", "What is 2?", []),
    ]
    assert run.scores["vqav2-val"].per_sample[2] == {"id": "vqav2_val:2", "accuracy": 0.3} and not run.notes
    assert run.predictions[0].prompt.endswith("Short answer.") and run.predictions[0].task == "vqav2-val"


def test_scores_inside_objects(tmp_path: Path) -> None:
    marks = {"score": 1.0, "prediction": "yes", "ground_truth": "yes", "question_id": "7"}
    task = {"results": {"pope_accuracy,none": 1.0, "pope_f1_score,none": 1.0}, "n": (1, 1)}
    task["samples"] = [sample(0, "yes", pope_accuracy=marks, pope_f1_score=marks)]
    run = read_lmms_eval(lmms_results(tmp_path, {"pope": task}))
    assert run.predictions[0].score == {"accuracy": 1.0}


def test_it_shares_a_column_only_where_the_rule_is_the_same(runs: Runs, tmp_path: Path) -> None:
    rows = say([runs.picture("a.png"), runs.picture("b.png")], 0.5)["vqav2"]
    ours = [
        runs.eval("one", "Ours", {"vqav2-val": rows}),
        runs.eval("two", "Ours, as lmms-eval", {"vqav2-val": rows}, settings={"rule": "always"}),
    ]
    path = lmms_results(tmp_path / "lmms", {"vqav2_val": {**VQA, "n": (4, 4)}})
    table_rows = system_rows(collect([*ours, path]).runs)
    assert [(g.task, g.variant) for g in groups_of(table_rows)] == [("vqav2-val", "Rule official"), ("vqav2-val", "Rule always")]
    (table,) = score_tables(table_rows)
    shown = {label: [cell.text != "–" for _, cell in cells] for label, cells in table.rows}
    assert shown == {
        "Ours": [True, False],
        "Ours, as lmms-eval": [False, True],
        "llava-hf/llava-1.5-7b-hf (lmms-eval)": [False, True],
    }
    _, without = differences(table_rows, seed=0)
    assert without[0] == "Ours, as lmms-eval, vqav2-val: not compared with Ours, Rule is always, there official"


def test_two_imports_are_compared_sample_by_sample(tmp_path: Path) -> None:
    def imported(name: str, wins: int) -> Path:
        samples = [sample(i, "red", exact_match=float(i < wins)) for i in range(40)]
        task = {"results": {"exact_match,none": wins / 40}, "n": (40, 40), "samples": samples}
        return lmms_results(tmp_path / name, {"gqa": task}, model_name=name)

    paths = [imported("a", 35), imported("b", 10)]
    found, _ = differences(system_rows(collect(paths).runs), seed=0)
    assert [(d.system, d.n, d.value, d.verdict) for d in found] == [("b (lmms-eval)", 40, -0.625, "lower")]
    page = build_report(paths, tmp_path / "out").read_text()
    assert "imported from lmms-eval 0.7.2" in page and "picture not logged" in page
    # Said once, not for each sample.
    assert "Picture not shown" not in page and page.count("shown without pictures, which lmms-eval 0.7.2 does not log") == 2


def test_broken_files_are_refused_with_file_and_reason(tmp_path: Path) -> None:
    def refused(text: str, message: str, name: str = "results.json") -> None:
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(InputError, match=message) as error:
            collect([path])
        assert str(path) in str(error.value)

    refused('{"results": {"gqa": {"exa', "is not JSON.*cut off")
    refused("[1]", "not a result file of lmms-eval")
    refused('{"tasks": {}}', 'not a result file of lmms-eval .it has no "results" and "configs"')
    refused('{"results": {"gqa": 3}, "configs": {}}', "task 'gqa' is no object of metrics")
    refused('{"results": {"gqa": {"alias": "gqa", "x,none": "N/A"}}, "configs": {"gqa": {}}}', "no task in it has a figure")
    both = {name: {"results": {"gpt_eval_score,none": 60.0}} for name in ("mmbench_en_dev", "mmbench_en_dev_static")}
    refused(lmms_results(tmp_path / "x", both).read_text(), "another task both are mmbench-en-dev here")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"doc_id": 1, "filt', r"samples_gqa.jsonl:2: not valid JSON"),
        ('{"doc_id": 1}', r"samples_gqa.jsonl:2: no sample of lmms-eval"),
        ("7", r"samples_gqa.jsonl:2: no sample of lmms-eval"),
        (json.dumps(sample(0, "x")), r"samples_gqa.jsonl:2: doc_id 0 is there twice"),
    ],
)
def test_broken_samples_name_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = lmms_results(tmp_path, {"gqa": {"results": {"exact_match,none": 1.0}, "samples": [sample(0, "red")]}})
    with (tmp_path / "20260101_120000_samples_gqa.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=message):
        read_lmms_eval(path)


def test_samples_of_another_run_are_not_taken(tmp_path: Path) -> None:
    task = {"results": {"exact_match,none": 1.0}, "n": (1, 1)}
    first = lmms_results(tmp_path, {"gqa": {**task, "samples": [sample(0, "red")]}}, date="20260101_000000")
    lmms_results(tmp_path, {"gqa": {**task, "samples": [sample(0, "blue")]}}, date="20260202_000000")
    assert [p.text for p in read_lmms_eval(first).predictions] == ["red"]
    first.rename(tmp_path / "lmms_results.json")
    with pytest.raises(InputError, match=r"2 files may hold the samples of gqa: 20260101_000000_samples_gqa.jsonl"):
        read_lmms_eval(tmp_path / "lmms_results.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=4) | st.just("qqq"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.just("default"), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_file_with_anything_in_any_place_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    task = {"results": {"exact_match,none": 0.5, "exact_match_stderr,none": 0.1}, "n": (2, 2)}
    folder = tmp_path / "fuzz"
    path = lmms_results(folder, {"textvqa_val": {**task, "samples": [sample(0, "red", exact_match=1.0), sample(1, "x")]}})
    rows = folder / "20260101_120000_samples_textvqa_val.jsonl"
    target = data.draw(st.sampled_from([path, rows]))
    lines = target.read_text().splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    content = json.loads(lines[number])
    spot = content
    # Down some way into the file, and there another value.
    while True:
        key = data.draw(st.sampled_from(list(spot)))
        if not isinstance(spot[key], dict) or not spot[key] or data.draw(st.booleans()):
            spot[key] = data.draw(JSON)
            break
        spot = spot[key]
    lines[number] = json.dumps(content)
    target.write_text("\n".join(lines))
    try:
        run = read_lmms_eval(path)
    except InputError as error:
        assert path.name in str(error) or rows.name in str(error)
    else:
        score_tables(system_rows([run]))
        assert all(isinstance(p.text, str) for p in run.predictions)
