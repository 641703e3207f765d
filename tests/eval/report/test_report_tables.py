from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from report_runs import row, score

from mmkit.eval.report import build_report
from mmkit.eval.report.collect import collect
from mmkit.eval.report.conditions import conditions, departures, flat
from mmkit.eval.report.differences import Difference, differences, sign_patterns
from mmkit.eval.report.runs import Score
from mmkit.eval.report.systems import Row, system_rows
from mmkit.eval.report.tables import Column, apart_lines, score_tables, task_columns
from mmkit.eval.report.view import parts_of


def rows_of(world: list[Path]) -> list[Row]:
    return system_rows([run for run in collect(world).runs if run.kind == "eval"])


def test_runs_of_one_system_merge_in_the_given_order(world: list[Path]) -> None:
    rows = rows_of(world)
    assert [row.label for row in rows] == ["SuperClass", "random frozen", "blind"]
    assert [run.name for run in rows[0].runs] == ["superclass-captions", "superclass-vqa"]
    assert set(rows[0].scores) == {"coco-caption", "vqav2"} and rows[0].run_of("vqav2").name == "superclass-vqa"


def test_the_same_task_twice_gives_rows_with_the_runs_names(runs) -> None:
    answers = {"vqav2": [row(1, Path("a.png"), "red", ["red"], {"accuracy": 1.0}, question="colour?")]}
    paths = [runs.eval("first", "SuperClass", answers), runs.eval("second", "SuperClass", answers)]
    assert [r.label for r in rows_of(paths)] == ["SuperClass (first)", "SuperClass (second)"]


def test_cells_are_scaled_and_the_best_is_bold(world: list[Path]) -> None:
    rows = rows_of(world)
    (table,) = score_tables(rows)
    assert [(g.task, [c.heading for c in g.columns]) for g in table.groups] == [
        ("coco-caption", ["CIDEr", "BLEU-4"]),
        ("vqav2", ["Accuracy"]),
    ]
    for label, cells in table.rows:
        accuracy = next(r for r in rows if r.label == label).scores["vqav2"].metrics["accuracy"]
        column, cell = cells[-1]
        assert cell.text == f"{accuracy * 100:.1f}" and column.unit == "%"
        assert cell.interval == f"{accuracy * 100 - 4:.1f} to {accuracy * 100 + 4:.1f}"
    assert [cell.best for _, cells in table.rows for _, cell in cells] == [True] * 3 + [False] * 6


def test_ties_are_all_best_one_row_has_none_and_missing_is_a_dash(runs) -> None:
    def run(name: str, **tasks: float) -> Path:
        return runs.run(name, "eval", manifest={"system": name}, scores={t: score(t, {"accuracy": v}) for t, v in tasks.items()})

    a, b, c = run("a", gqa=0.50004, pope=0.5), run("b", gqa=0.50001), run("c", gqa=0.2)
    (table,) = score_tables(rows_of([a, b, c]))
    assert [cells[0][1].best for _, cells in table.rows] == [True, True, False]
    assert [(cells[1][1].text, cells[1][1].best) for _, cells in table.rows] == [("50.0", False), ("–", False), ("–", False)]
    (table,) = score_tables(rows_of([a]))
    assert not any(cell.best for _, cells in table.rows for _, cell in cells)


def test_parts_show_the_figure_of_their_suite(runs) -> None:
    def run(name: str, **figures: float) -> Path:
        more = {"breakdown": {"split": {"random": {"tp": 3, **figures, "n": 10}}}}
        return runs.run(name, "eval", scores={"x": {**score("mme", {"perception": 1.0}), **more}})

    assert parts_of(rows_of([run("a", f1=0.5, accuracy=0.7)]))[0].rows == [("random", 10, ["50.0"])]
    points = parts_of(rows_of([run("b", points=185.0, accuracy=0.9), run("c", points=90.5)]))[0]
    assert (points.heading, points.systems, points.rows) == ("Points", ["b", "c"], [("random", 10, ["185.0", "90.5"])])


def test_with_and_without_ocr_never_share_a_column(rich: list[Path]) -> None:
    rows = rows_of(rich)
    tables = score_tables(rows)
    groups = [(g.task, g.variant) for t in tables for g in t.groups]
    assert groups[-2:] == [("textvqa-val", "OCR none"), ("textvqa-val", "OCR reference")]
    figures = {label: [cell for column, cell in cells if column.task == "textvqa-val"] for label, cells in tables[-1].rows}
    assert [cell.text != "–" for cell in figures["SuperClass"]] == [True, False]
    assert [cell.text != "–" for cell in figures["with OCR"]] == [False, True]
    # Alone in its column it is the best of nothing, and has no difference to a figure without OCR.
    assert not figures["with OCR"][1].best and figures["with OCR"][1].delta == ""


def test_a_figure_over_other_samples_or_another_tokenizer_is_never_the_best(runs, rich: list[Path]) -> None:
    (table,) = [t for t in score_tables(rows_of(rich)) if "textvqa-val" in [g.task for g in t.groups]]
    cells = {label: next(cell for c, cell in line if c.task == "textvqa-val") for label, line in table.rows}
    part = cells["a part only"]
    assert part.text == "100.0" and not part.best and part.delta == "" and cells["SuperClass"].best
    assert part.apart == ["10 samples, the column's first has 28"]
    assert apart_lines([table]) == ["a part only, textvqa-val: 10 samples, the column's first has 28"]
    rows = {"coco-caption": [row(i, Path(f"{i}.png"), "x", ["x"], {"CIDEr": 1.0 + i}) for i in range(3)]}
    java = runs.eval("java", "java", rows, settings={"tokenizer": "java"})
    python = runs.eval("python", "python", rows, settings={"tokenizer": "python"})
    (table,) = score_tables(rows_of([java, python]))
    assert [line[0][1].apart for _, line in table.rows] == [[], ["tokenizer python, the column's first has java"]]


def asked(runs, name: str, wins: int, total: int = 30, **settings: object) -> Path:
    rows = [row(i, Path(f"{i}.png"), "x", ["x"], {"accuracy": float(i < wins)}, question="q?") for i in range(total)]
    return runs.eval(name, name, {"vqav2": rows}, settings=settings)


def test_a_figure_asked_otherwise_is_marked_and_claims_nothing(runs) -> None:
    short, long = ({"prompt": "{question}\nAnswer the question using a single " + end} for end in ("word.", "word or phrase."))
    rows = rows_of([asked(runs, "a", 20, **short), asked(runs, "b", 3, **long), asked(runs, "c", 2, **short)])
    found, without = differences(rows, seed=0)
    (table,) = score_tables(rows, {(d.system, d.column): "*" for d in found})
    cells = {label: line[0][1] for label, line in table.rows}
    assert cells["b"].apart == [
        "prompt “…question using a single word or phrase.”, the column's first has “…question using a single word.”"
    ]
    assert (cells["b"].best, cells["b"].delta, cells["b"].mark) == (False, "", "")
    assert (cells["a"].best, cells["c"].delta, cells["c"].mark) == (True, "−60.0", "*")
    # Tested all the same, for whoever wants the pair as it is; what stands beside it is said.
    assert [(d.system, d.verdict, len(d.unlike)) for d in found] == [("b", "lower", 1), ("c", "lower", 0)] and without == []
    assert found[0].unlike[0].endswith("a has “…question using a single word.”")


@pytest.mark.parametrize(
    ("one", "other", "lines"),
    [
        ({"decoding": "greedy"}, {"decoding": "beam 5"}, ["decoding greedy, the column's first has beam 5"]),
        # A captioner takes no prompt, and bare scores tell no decoding.
        ({"prompt": ""}, {"prompt": "Describe it."}, []),
        ({}, {"decoding": "beam 5"}, []),
        ({"prompt": "a\nb"}, {"prompt": "a b"}, ["prompt “a⏎b”, the column's first has “a b”"]),
        ({"prompt": "a"}, {"prompt": "a\n"}, ["prompt “a”, the column's first has “a⏎”"]),
        ({"tokenizer": "java"}, {}, ["tokenizer java, the column's first has not recorded"]),
        ({"batch_size": 1}, {"batch_size": 64}, []),
    ],
)  # fmt: skip
def test_what_makes_scores_unlike(one: dict[str, str], other: dict[str, str], lines: list[str]) -> None:
    made = [Score("vqav2", {"accuracy": 0.5}, {}, 10, settings, []) for settings in (one, other)]
    assert departures(*made) == lines


def test_other_data_are_not_compared(runs) -> None:
    def run(name: str, mark: str, *tasks: str) -> Path:
        rows = [row(i, Path(f"{i}.png"), "x", ["x"], {"accuracy": float(i < 5)}, question="q?") for i in range(9)]
        return runs.eval(name, name, dict.fromkeys(tasks, rows), data={"fingerprint": mark * 32})

    rows = rows_of([run("a", "a", "gqa"), run("b", "b", "gqa"), run("c", "a", "gqa"), run("d", "d", "gqa", "vqav2")])
    (table,) = score_tables(rows)
    cells = {label: line[0][1] for label, line in table.rows}
    assert cells["b"].apart == ["data bbbbbbbbbbbb…, the column's first has aaaaaaaaaaaa…"] and not cells["b"].best
    # Of other tasks the fingerprint is another in any case.
    assert cells["c"].best and cells["c"].apart == cells["d"].apart == []
    found, without = differences(rows, seed=0)
    assert [d.system for d in found] == ["c", "d"]
    assert without[:1] == ["b, gqa: no paired test, its data bbbbbbbbbbbb… are not a's aaaaaaaaaaaa…"]


def test_one_reason_for_several_tasks_is_one_line(runs) -> None:
    def run(name: str, n: int) -> Path:
        return runs.run(name, "eval", scores={t: score(t, {"accuracy": 0.5}, n=n) for t in ("gqa", "mine", "vqav2")})

    tables = score_tables(rows_of([run("a", 40), run("b", 10)]))
    assert apart_lines(tables) == ["b, gqa, mine, vqav2: 10 samples, the column's first has 40"]


def test_unlike_conditions_are_said_in_every_form(runs, tmp_path: Path) -> None:
    paths = [asked(runs, "a", 20, prompt="{question} One word."), asked(runs, "b", 3, prompt="{question}")]
    text = build_report(paths, tmp_path / "out").read_text()
    line = "b, vqav2: prompt “{question}”, a has “{question} One word.”: the difference may be that of the conditions"
    assert line in text and "b, vqav2: prompt “{question}”, the column&#39;s first has “{question} One word.”" in text
    assert 'class="verdict lower">lower</span><span class="flag" role="img" aria-label="asked otherwise">≠' in text
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "| lower ≠ |" in markdown and markdown.count("- ≠ b, vqav2: prompt") == 2
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["not_comparable"] == ["b, vqav2: prompt “{question}”, the column's first has “{question} One word.”"]
    assert found["differences"][0]["unlike"] == ["prompt “{question}”, a has “{question} One word.”"] and found["rules"] == []
    assert r"10.0$^{\dagger}$" in (tmp_path / "out" / "report.tex").read_text()


def test_many_tests_still_find_what_is_plain(runs) -> None:
    # 5,000 patterns give no p below 1 / 5001, and that times 26 * 10 tests is above 0.05.
    samples = {right: [{"id": i, "accuracy": float(right)} for i in range(20)] for right in (True, False)}
    paths = []
    for i in range(27):
        tasks = {f"t{k}": score("gqa", {"accuracy": float(i == 0)}, n=20, per_sample=samples[i == 0]) for k in range(10)}
        paths.append(runs.run(f"r{i}", "eval", manifest={"system": f"S{i}"}, scores=tasks))
    rows = rows_of(paths)
    found, _ = differences(rows, seed=0)
    assert len(found) == 260 and {d.verdict for d in found} == {"lower"} and sign_patterns(rows) == 13_000
    assert sign_patterns(rows[:2]) == 5000


def test_tasks_that_the_first_system_lacks_are_said_not_to_be_compared(runs) -> None:
    first = runs.run("a", "eval", scores={"gqa": score("gqa", {"accuracy": 0.5})})
    others = [
        runs.run(n, "eval", scores={"mme": score("mme", {"perception": 1.0}), "pope": score("pope", {"f1": 0.5})}) for n in "bc"
    ]
    assert differences(rows_of([first, *others]), seed=0)[1] == ["mme, pope: no differences, for a was not scored on them"]


@pytest.mark.parametrize(("pictures", "systems", "verdict"), [(5, 2, "few"), (6, 2, "lower"), (6, 3, "few"), (7, 3, "lower")])
def test_few_pictures_decide_nothing(runs, pictures: int, systems: int, verdict: str) -> None:
    # The first is right on every picture, the others on none: the clearest that data can be.
    paths = [asked(runs, f"s{i}", 0 if i else pictures, pictures) for i in range(systems)]
    found, _ = differences(rows_of(paths), seed=0)
    assert [(d.verdict, d.pictures) for d in found] == [(verdict, pictures)] * (systems - 1)
    assert found[0].words == {"few": "too few pictures to decide"}.get(verdict, verdict)


def test_a_cell_says_its_conditions_and_what_makes_it_doubtful(rich: list[Path]) -> None:
    (table,) = [t for t in score_tables(rows_of(rich)) if "textvqa-val" in [g.task for g in t.groups]]
    cell = next(cell for c, cell in table.rows[0][1] if c.task == "textvqa-val")
    told = dict(cell.conditions)
    assert told["OCR"] == "none" and told["Rule"] == "m4c" and told["n"] == "28" and told["Decoding"] == "greedy"
    assert cell.warnings == [
        "3 of 28 answers have more than 5 words and can hardly match",
        "no answer was found in 2 of 28 texts",
    ]
    keys = [cell.key for t in score_tables(rows_of(rich)) for _, line in [*t.rows, *t.references] for _, cell in line if cell.key]
    assert len(keys) == len(set(keys))


def test_published_figures_stand_below_once_and_never_count(runs) -> None:
    def run(name: str, value: float, published: list[dict[str, object]]) -> Path:
        more = {**score("gqa", {"accuracy": value}), "published": published}
        return runs.run(name, "eval", manifest={"system": name}, scores={"gqa": more})

    llava = {"system": "LLaVA", "metrics": {"accuracy": 0.62, "other": 1.0}, "source": "MODEL_ZOO", "conditions": "7B"}
    other = {**llava, "metrics": {"accuracy": 0.633}, "conditions": "13B"}
    (table,) = score_tables(rows_of([run("a", 0.5, [llava, other]), run("b", 0.4, [llava])]))
    assert [(label, cells[0][1].text) for label, cells in table.references] == [
        ("LLaVA", "62.0"), ("LLaVA (MODEL_ZOO, 13B)", "63.3"),
    ]  # fmt: skip
    assert dict(table.references[0][1][0][1].conditions) == {"Published for": "LLaVA", "Source": "MODEL_ZOO", "Conditions": "7B"}
    assert [cells[0][1].best for _, cells in [*table.rows, *table.references]] == [True, False, False, False]


def test_more_is_not_better_for_a_share_of_yes(runs) -> None:
    paths = [runs.run(n, "eval", scores={"mine": score("mine", {"yes_ratio": v})}) for n, v in (("a", 0.5), ("b", 0.9))]
    (table,) = score_tables(rows_of(paths))
    assert [cells[0][1].best for _, cells in table.rows] == [False, False]


def test_stars_and_deltas(world: list[Path]) -> None:
    rows = rows_of(world)
    marks = {(d.system, d.column): "*" for d in differences(rows, seed=0)[0] if d.significant}
    assert marks
    (table,) = score_tables(rows, marks)
    for label, cells in table.rows:
        for column, cell in cells:
            assert cell.mark == marks.get((label, column), "")
            # The first row is what the others are held against.
            assert (cell.delta == "") == (label == "SuperClass")
    assert not any(cell.mark for _, cells in table.rows for column, cell in cells if column.metric == "Bleu_4")


def test_points_are_tested_by_which_answers_are_right(runs) -> None:
    def run(name: str, right: int) -> Path:
        samples = [{"id": i, "accuracy": float(i < right)} for i in range(30)]
        return runs.run(name, "eval", scores={"mme": score("mme", {"perception": 50.0 * right}, per_sample=samples)})

    rows = rows_of([run("a", 28), run("b", 9)])
    found, without = differences(rows, seed=0)
    assert [(d.column.metric, d.n, d.verdict) for d in found] == [("accuracy", 30, "lower")] and without == []
    # Points have a difference, and no star: they are not what was tested.
    (table,) = score_tables(rows, {(d.system, d.column): "*" for d in found})
    assert (table.rows[1][1][0][1].delta, table.rows[1][1][0][1].mark) == ("−950.0", "")


def test_scores_without_samples_are_not_tested(runs) -> None:
    paths = [runs.run(n, "eval", scores={"mme": score("mme", {"perception": 1000.0})}) for n in "ab"]
    assert differences(rows_of(paths), seed=0) == ([], ["b, mme: no paired test, single samples are not in the scores"])


def test_wide_tables_are_cut_between_tasks(runs) -> None:
    tasks = {f"task{i}": score("coco-caption", {"CIDEr": 1.0, "Bleu_4": 0.3, "ROUGE_L": 0.5}) for i in range(5)}
    tables = score_tables(rows_of([runs.run("a", "eval", scores=tasks)]))
    assert [[g.task for g in t.groups] for t in tables] == [["task0", "task1"], ["task2", "task3"], ["task4"]]


def test_figures_without_a_known_scale_are_as_stored() -> None:
    assert Column("mme", "perception").show(1510.7) == "1510.7" and Column("mine", "wups").show(0.1234) == "0.123"
    assert Column("vqav2", "accuracy").show(math.nan) == "–"


def test_differences_are_system_minus_first_with_the_sign_of_the_interval(world: list[Path]) -> None:
    rows = rows_of(world)
    found, without = differences(rows, seed=0)
    assert [(d.system, d.column.task, d.n) for d in found] == [
        ("random frozen", "coco-caption", 15), ("blind", "coco-caption", 15),
        ("random frozen", "vqav2", 30), ("blind", "vqav2", 30),
    ]  # fmt: skip
    assert without == []
    for d in found:
        expected = [
            next(r for r in rows if r.label == s).scores[d.column.task].metrics[d.column.metric] for s in (d.system, d.baseline)
        ]
        assert d.value == pytest.approx(expected[0] - expected[1])
        assert d.low <= d.value <= d.high < 0 and d.verdict == "lower" and d.p <= d.p_holm < 0.05
    assert found == differences(rows, seed=0)[0] != differences(rows, seed=1)[0]


def test_differences_pair_by_id_and_tell_what_is_not_shared(runs) -> None:
    def eval_run(name: str, values: dict[int, float]) -> Path:
        rows = [row(k, Path(f"{k}.png"), "x", ["x"], {"accuracy": v}, question="q") for k, v in values.items()]
        return runs.eval(name, name, {"vqav2": rows})

    a = eval_run("a", {1: 0.0, 2: 1.0, 3: 0.5, 4: 0.0})
    b = eval_run("b", {3: 0.5, 2: 1.0, 1: 0.0, 9: 1.0})
    c = eval_run("c", {70: 1.0, 1: 0.2})
    found, without = differences(rows_of([a, b, c]), seed=0)
    assert [(d.system, d.n, d.value, d.verdict) for d in found] == [("b", 3, 0.0, "few")]
    assert without == ["b, vqav2: only 3 of 4 samples are shared with a", "c, vqav2: fewer than two samples in common with a"]


def test_signed_figures() -> None:
    column = Column("vqav2", "accuracy")
    d = Difference("b", "a", column, 10, 0.031, 0.001, 0.06, 0.04, 0.049, 10)
    assert [d.show(v) for v in (0.031, -0.031, 0.0, -0.00001)] == ["+3.1", "−3.1", "0.0", "0.0"]
    assert d.verdict == "higher" and replace(d, value=-0.031).verdict == "lower"
    # The interval excludes zero, the corrected test does not find it enough.
    assert replace(d, p_holm=0.05).verdict == "unclear"


def test_conditions_merge_equal_values_and_split_different_ones(runs) -> None:
    asked = {"vqav2": [row(i, Path("a.png"), "x", ["x"], {"accuracy": 1.0}, question=f"q{i}?") for i in range(2)]}
    encoder = runs.train("enc", "superclass")
    a = runs.eval("a", "A", asked, model=encoder, settings={"ocr": "none", "max_new_tokens": 16})
    b = runs.eval("b", "B", asked, model=encoder, settings={"batch_size": 8, "notes": ["x", {"k": True}]})
    lines = [(c.name, c.value, c.systems) for c in conditions(rows_of([a, b]))["vqav2"]]
    assert lines == [
        ("Prompt", "USER: <image>\n{question}\nASSISTANT:", []),
        ("OCR", "none", ["A"]),
        ("OCR", "not recorded", ["B"]),
        ("Rule", "official", []),
        ("Decoding", "greedy", []),
        ("Batch size", "32", ["A"]),
        ("Batch size", "8", ["B"]),
        ("n", "2", []),
        ("Model", "model mmmmmmmmmmmm…", []),
        ("max_new_tokens", "16", ["A"]),
        ("max_new_tokens", "not recorded", ["B"]),
        ("notes", "not recorded", ["A"]),
        ("notes", "x, k=true", ["B"]),
    ]
    assert flat(None) == "" and flat({"a": None, "b": [1, 2.5]}) == "a=none, b=1, 2.5"


def test_prompts_that_differ_and_empty_prompts_are_said(runs) -> None:
    rows = [row(i, Path("a.png"), "x", ["x"], {"CIDEr": 1.0}, prompt=p) for i, p in enumerate(["one", "two"])]
    a = runs.eval("a", "A", {"coco-caption": rows})
    b = runs.eval("b", "B", {"coco-caption": rows}, settings={"prompt": ""})
    lines = [(c.value, c.systems) for c in conditions(rows_of([a, b]))["coco-caption"] if c.name == "Prompt"]
    assert lines == [("differs by sample, e.g. one", ["A"]), ("none", ["B"])]


def test_halves_are_rounded_alike_in_every_place(runs) -> None:
    # 98.75 - 7.5 in floats is a hair off 91.25: the table of scores and that of differences printed two figures for it.
    def run(name: str, right: int) -> Path:
        return asked(runs, name, right, total=160)

    rows = rows_of([run("a", 158), run("b", 12)])
    (table,) = score_tables(rows)
    (difference,) = differences(rows, seed=0)[0]
    assert [line[0][1].text for _, line in table.rows] == ["98.8", "7.5"]
    assert table.rows[1][1][0][1].delta == difference.show(difference.value) == "−91.3"
    column = Column("x", "accuracy")
    assert [column.show(v) for v in (0.0005, 0.00049, 0.1225, 0.9125, 0.91250000000000014)] == [
        "0.1",
        "0.0",
        "12.3",
        "91.3",
        "91.3",
    ]


def test_no_spread_is_no_interval(runs, tmp_path: Path) -> None:
    more = {"ci95": {"accuracy": [1.0, 1.0]}}
    rows = [row(i, Path(f"{i}.png"), "x", ["x"], {"accuracy": 1.0}, question="q") for i in range(9)]
    path = runs.eval("a", "a", {"vqav2": rows}, more=more)
    (table,) = score_tables(rows_of([path]))
    assert table.rows[0][1][0][1].interval == "no spread" and table.even
    assert "No spread: all samples have the same figure" in build_report([path], tmp_path / "out").read_text()
    assert "100.0 (no spread)" in (tmp_path / "out" / "report.md").read_text()


def test_columns_follow_the_first_mention(world: list[Path]) -> None:
    assert [task for task, _ in task_columns(rows_of(world[::-1]))] == ["coco-caption", "vqav2"]
