"""Result files of lmms-eval, in the form that version 0.7 writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_runs import Runs, lmms_results, say

from mmkit.config import GenerationConfig
from mmkit.errors import InputError
from mmkit.eval.metrics import HEADLINES, headline
from mmkit.eval.report import build_report
from mmkit.eval.report.collect import collect
from mmkit.eval.report.conditions import conditions
from mmkit.eval.report.differences import differences
from mmkit.eval.report.lmms_eval import TASKS, decoding_of, read_lmms_eval
from mmkit.eval.report.systems import system_rows
from mmkit.eval.report.tables import groups_of, score_tables
from mmkit.eval.report.view import rule_lines
from mmkit.eval.scorers.choice import SCIENCEQA_RULES
from mmkit.eval.scorers.gqa import RULES as GQA_RULES
from mmkit.eval.scorers.vqa import RULES
from mmkit.eval.scorers.yesno import MME_RULES, POPE_RULES
from mmkit.eval.suites.vizwiz import RULES as VIZWIZ_RULES

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
    assert told["data"] == "lmms-lab/vqav2_val, validation" and told["generation_kwargs"]["max_new_tokens"] == 16
    assert told["decoding"] == "greedy"
    assert run.notes[0].startswith("no samples of vqav2_val beside")


def test_a_clustered_error_is_preferred_and_a_limit_told(tmp_path: Path) -> None:
    task = {"results": {**VQA["results"], "exact_match_stderr_clustered,none": 0.02}, "n": (214354, 500)}
    score = read_lmms_eval(lmms_results(tmp_path, {"vqav2_val": task})).scores["vqav2-val"]
    assert score.ci95["accuracy"] == pytest.approx((0.7652 - 0.0392, 0.7652 + 0.0392))
    assert score.n == 500 and score.settings["scored"] == "500 of 214354"


def test_intervals_stay_within_what_a_share_can_be_and_say_what_they_are(runs: Runs, tmp_path: Path) -> None:
    def interval(value: float, task: str = "gqa", metric: str = "exact_match", error: float = 0.02) -> tuple[float, float]:
        results = {f"{metric},none": value, f"{metric}_stderr,none": error}
        (score,) = read_lmms_eval(lmms_results(tmp_path, {task: {"results": results, "n": (9, 9)}})).scores.values()
        return next(iter(score.ci95.values()))

    assert interval(0.99) == pytest.approx((0.9508, 1.0)) and interval(0.01) == pytest.approx((0.0, 0.0492))
    assert interval(1.5, "coco2017_cap_val", "coco_CIDEr", 0.1) == pytest.approx((1.304, 1.696))
    path = lmms_results(tmp_path / "one", {"vqav2_val": VQA})
    assert (
        "95 % bootstrap interval; of imported figures 1.96 standard errors." in build_report([path], tmp_path / "out").read_text()
    )
    ours = runs.eval("ours", "Ours", say([runs.picture("a.png")], 1.0))
    page = build_report([ours], tmp_path / "out").read_text()
    assert "Below each figure its 95 % bootstrap interval." in page and "standard errors" not in page


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
        "coco_karpathy_test", "coco2017_cap_val", "vqav2_val", "textvqa_val", "vizwiz_vqa_val",
        "gqa", "scienceqa", "scienceqa_img", "pope", "pope_adv", "pope_pop", "pope_random", "mme",
    }  # fmt: skip


@pytest.mark.parametrize("task", sorted(TASKS))
def test_suites_rules_and_rows_exist_in_mmkit(task: str) -> None:
    known = TASKS[task]
    rules = {
        "vqav2": RULES, "textvqa": ["m4c"], "vizwiz": VIZWIZ_RULES, "gqa": GQA_RULES, "scienceqa": SCIENCEQA_RULES,
        "pope": POPE_RULES, "mme": MME_RULES, "coco-caption": [""],
    }  # fmt: skip
    if not known.rule.startswith("lmms-eval"):
        assert known.rule in rules[known.suite]
    names = set(known.metrics.values())
    assert set(headline(known.suite, dict.fromkeys(names, 0.0))) <= set(HEADLINES.get(known.suite, ("accuracy",)))


@pytest.mark.parametrize(
    ("task", "answers", "reference", "right"),
    [
        # As lmms_eval/tasks of version 0.7.3 have it: exact_match with ignore_case and ignore_punctuation for GQA, ...
        ("gqa", ["Red", "red.", "r-e.d!", " red", "dark red"], "red", [True, True, True, False, False]),
        # ... the letter alone in either case, or a capital with a period for ScienceQA.
        ("scienceqa", ["B", "b", "B. red", "b. red", "The answer is B.", "(B)"], "B", [True, True, True, False, False, False]),
    ],
)
def test_the_rule_named_is_the_rule_of_lmms_eval(task: str, answers: list[str], reference: str, right: list[bool]) -> None:
    rule = TASKS[task].rule
    if task == "gqa":
        found = [len(set(GQA_RULES[rule](text, reference))) == 1 for text in answers]
    else:
        found = [SCIENCEQA_RULES[rule](text) == reference for text in answers]
    assert found == right


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


def test_several_rules_are_explained_and_the_way_to_one_told(runs: Runs, tmp_path: Path) -> None:
    rows = say([runs.picture("a.png"), runs.picture("b.png")], 0.5)["vqav2"]
    tasks = dict.fromkeys(("gqa-testdev-balanced", "mmmu-val"), rows)
    ours = runs.eval("one", "Ours", tasks, settings={"rule": "llava"})
    path = lmms_results(
        tmp_path / "lmms",
        {
            "gqa": {"results": {"exact_match,none": 0.61}, "n": (4, 4)},
            "mmmu_val": {"results": {"mmmu_acc,none": 0.36}, "n": (4, 4)},
        },
    )
    gqa, mmmu = rule_lines(system_rows(collect([ours, path]).runs))
    assert gqa.startswith("gqa-testdev-balanced: one and the same answer may be right under one of these rules")
    assert gqa.endswith("columns of its own: llava; lmms. For lmms-eval's rule evaluate with settings.rule=lmms")
    assert mmmu.endswith("llava; lmms-eval: random letter where none is found, unseeded")
    page = build_report([ours, path], tmp_path / "out").read_text()
    assert gqa.replace("'", "&#39;") in page and "settings.rule=lmms" in (tmp_path / "out" / "report.md").read_text()
    # By that rule the two stand side by side.
    same = runs.eval("two", "Ours", {"gqa-testdev-balanced": rows}, settings={"rule": "lmms"})
    path = lmms_results(tmp_path / "alone", {"gqa": {"results": {"exact_match,none": 0.61}, "n": (4, 4)}})
    table_rows = system_rows(collect([same, path]).runs)
    assert len(groups_of(table_rows)) == 1 and rule_lines(table_rows) == []


@pytest.mark.parametrize(
    ("top", "version"),
    [
        ({"lmms_eval_version": "unknown@unknown", "git_hash": None}, "lmms-eval, version not recorded"),
        ({"lmms_eval_version": "unknown@unknown", "git_hash": "75571cf"}, "lmms-eval 75571cf"),
        ({"lmms_eval_version": "main@1a2b3c4d"}, "lmms-eval main@1a2b3c4d"),
        ({"lmms_eval_version": "0.7.3"}, "lmms-eval 0.7.3"),
        ({"lmms_eval_version": None, "git_hash": None}, "lmms-eval, version not recorded"),
    ],
)
def test_versions_are_what_the_file_says(tmp_path: Path, top: dict[str, object], version: str) -> None:
    run = read_lmms_eval(lmms_results(tmp_path, {"vqav2_val": VQA}, **top))
    assert run.imported == version and "unknown" not in run.manifest["mmkit"]
    assert run.manifest["git"] == (top.get("git_hash", "75571cf") or "not recorded")


@pytest.mark.parametrize(
    ("date", "arguments", "started"),
    [
        # Eight hours ahead, which is its default wherever it runs.
        ("20261125_080023", {"timezone": "Asia/Singapore"}, "2026-11-25T00:00:23Z"),
        ("20260701_120000", {"timezone": "America/New_York"}, "2026-07-01T16:00:00Z"),
        ("20261125_080023", {}, "2026-11-25T08:00:23 (time zone not recorded)"),
        ("20261125_080023", {"timezone": "Mars/North"}, "2026-11-25T08:00:23 (Mars/North)"),
        ("20261125_080023", {"timezone": "../../etc"}, "2026-11-25T08:00:23 (../../etc)"),
        ("some day", {"timezone": "UTC"}, "some day"),
    ],
)
def test_dates_are_printed_as_those_of_runs(tmp_path: Path, date: str, arguments: dict[str, str], started: str) -> None:
    config = {"model": "llava_hf", "model_args": "", "resolved_cli_args": arguments}
    path = lmms_results(tmp_path, {"vqav2_val": VQA}, date="20260101_120000", config=config)
    content = json.loads(path.read_text()) | {"date": date}
    path.write_text(json.dumps(content))
    assert read_lmms_eval(path).manifest["started"] == started


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({}, "greedy"),
        ({"temperature": 0, "num_beams": 1, "do_sample": False, "top_p": 1.0}, "greedy"),
        ({"num_beams": 5}, "beam 5"),
        ({"temperature": 0.7, "top_p": 0.9}, "sample, temperature 0.7, top_p 0.9"),
        ({"temperature": 0.7, "do_sample": False}, "greedy"),
    ],
)
def test_decoding_in_the_words_of_mmkit(kwargs: dict[str, object], words: str) -> None:
    assert decoding_of(kwargs) == words
    ours = {"num_beams": 5} if words == "beam 5" else {}
    if not words.startswith("sample"):
        assert GenerationConfig(**ours).describe() == words


def test_a_prompt_that_the_task_does_not_tell_is_read_from_the_samples(tmp_path: Path) -> None:
    task = {**VQA, "config": {"lmms_eval_specific_kwargs": None}}
    samples = [sample(0, "red"), sample(1, "blue")]
    run = read_lmms_eval(lmms_results(tmp_path / "two", {"mine": {**task, "samples": samples}}))
    assert run.scores["mine"].settings["prompt"] == "{question}\nShort answer."
    assert [p.question for p in run.predictions] == ["What is 0?", "What is 1?"]
    # One sample does not tell question and prompt apart.
    path = lmms_results(tmp_path / "one", {"mine": {**task, "samples": samples[:1]}})
    row = system_rows(collect([path]).runs)
    assert "prompt" not in row[0].scores["mine"].settings
    assert not [c for c in conditions(row)["mine"] if c.name == "Prompt"]


def test_pictures_that_are_named_are_shown_and_tested_together(runs: Runs, tmp_path: Path) -> None:
    pictures = [runs.picture(f"{i}.png") for i in range(8)]

    def imported(name: str, wins: int, media: bool = True) -> Path:
        samples = [
            sample(i, "red", exact_match=float(i < wins), **({"input_media": [str(pictures[i // 4])]} if media else {}))
            for i in range(32)
        ]
        task = {"results": {"exact_match,none": wins / 32}, "n": (32, 32), "samples": samples}
        return lmms_results(tmp_path / name, {"gqa": task}, model_name=name)

    paths = [imported("a", 32), imported("b", 0)]
    found, _ = differences(system_rows(collect(paths).runs), seed=0)
    assert [(d.n, d.pictures) for d in found] == [(32, 8)]
    page = build_report(paths, tmp_path / "out").read_text()
    assert 'alt="0.png"' in page and "shown without pictures" not in page and "picture not logged" not in page
    pictures[0].unlink()
    assert "0.png (file not found)" in build_report(paths, tmp_path / "out").read_text()
    bare = [imported("a", 32, media=False), imported("b", 0, media=False)]
    found, _ = differences(system_rows(collect(bare).runs), seed=0)
    assert found[0].pictures == 32


def test_inlined_pictures_become_short_names(tmp_path: Path) -> None:
    uris = ["data:image/png;base64," + letter * 5000 for letter in "AAB"]
    samples = [sample(i, "red", input_media=[uri]) for i, uri in enumerate(uris)]
    run = read_lmms_eval(lmms_results(tmp_path, {"gqa": {**VQA, "samples": samples}}))
    names = [p.image for p in run.predictions]
    assert names[0] == names[1] != names[2] and max(map(len, names)) < 40


def test_a_folder_is_its_newest_results(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = {"results": {"exact_match,none": 0.25}, "n": (1, 1), "samples": [sample(0, "red")]}
    two = {**one, "results": {"exact_match,none": 0.75}, "samples": [sample(0, "blue")]}
    folder = tmp_path / "out" / "model"
    new = lmms_results(folder, {"gqa": two}, date="20260202_000000")
    lmms_results(folder, {"gqa": one, "vqav2_val": one}, date="20260101_000000")
    for named in (folder, tmp_path / "out"):
        found = collect([named])
        assert [run.path for run in found.runs] == [new] and [p.text for p in found.runs[0].predictions] == ["blue"]
        assert found.notes == [
            "model: 20260202_000000_results.json was read, the newest of 2 results files; vqav2_val stand only in older ones: "
            "name those files too"
        ]
    assert found.notes[0] in caplog.text and found.notes[0] in build_report([folder], tmp_path / "report").read_text()
    # A folder with a folder for each model is all of them.
    other = lmms_results(tmp_path / "out" / "other", {"gqa": one}, model_name="other")
    assert [run.path for run in collect([tmp_path / "out"]).runs] == [new, other]
    # The folder and its file are one run.
    assert collect([folder, new]).notes[-1] == f"{new} and {folder} are one run; it counts once"


def test_results_inside_a_run_are_results(runs: Runs) -> None:
    folder = runs.probe("probe", "Mine", 0.9) / "lmms"
    path = lmms_results(folder, {"gqa": {"results": {"exact_match,none": 0.5}, "n": (1, 1)}})
    assert collect([path]).runs[0].path == collect([folder]).runs[0].path == path
    assert collect([path.rename(folder.parent / path.name)]).runs[0].imported


def test_samples_alone_name_the_results_to_give(tmp_path: Path) -> None:
    path = lmms_results(tmp_path, {"gqa": {**VQA, "samples": [sample(0, "red")]}})
    samples = tmp_path / "20260101_120000_samples_gqa.jsonl"
    with pytest.raises(InputError, match=r"holds the samples of lmms-eval, not its results; give .*_results.json, whose samples"):
        collect([samples])
    path.unlink()
    with pytest.raises(InputError, match=r"give the ..._results.json that lmms-eval wrote under --output_path; its samples"):
        collect([samples])


def test_samples_of_a_run_without_any_are_not_those_of_another(tmp_path: Path) -> None:
    task = {"results": {"exact_match,none": 1.0}, "n": (1, 1)}
    first = lmms_results(tmp_path, {"gqa": task}, date="20260101_000000")
    lmms_results(tmp_path, {"gqa": {**task, "samples": [sample(0, "blue")]}}, date="20260202_000000")
    run = read_lmms_eval(first)
    assert run.predictions == [] and run.notes[0].startswith("no samples of gqa beside 20260101_000000_results.json")


@pytest.mark.parametrize("name", ["a/b", "../x", "[ab]", "*"])
def test_a_task_name_is_no_path_and_no_pattern(tmp_path: Path, name: str) -> None:
    path = lmms_results(tmp_path, {name: {"results": {"exact_match,none": 1.0}}, "a": {"results": {"exact_match,none": 1.0}}})
    (tmp_path / "20260101_120000_samples_a.jsonl").write_text(json.dumps(sample(0, "red")) + "\n")
    assert [p.task for p in read_lmms_eval(path).predictions] == ["a"]


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
    assert (
        "Picture not shown" not in page
        and page.count("shown without pictures, which lmms-eval 0.7.2 did not log; in tests each counts") == 2
    )


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
