"""MME: points of known counters, both layouts of the benchmark, every form of answers, and one clear line for every bad file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.score import score
from mmkit.eval.scorers.mme_files import COGNITION, PERCEPTION, bare_question
from mmkit.eval.suites import find_suite
from mmkit.eval.tasks import load_task

END = " Please answer yes or no."
# LaVIN's points with the evaluation tool, and the pictures of each subtask.
LAVIN = {
    "existence": (30, 185.0),
    "count": (30, 88.33333333333334),
    "position": (30, 63.333333333333336),
    "color": (30, 75.0),
    "posters": (147, 79.59183673469389),
    "celebrity": (170, 47.35294117647059),
    "scene": (200, 136.75),
    "landmark": (200, 93.5),
    "artwork": (200, 87.25),
    "OCR": (20, 107.5),
    "commonsense_reasoning": (70, 87.14285714285714),
    "numerical_calculation": (20, 65.0),
    "text_translation": (20, 47.5),
    "code_reasoning": (20, 50.0),
}


def benchmark(root: Path, subtasks: tuple[str, ...] = ("existence", "artwork"), pictures: int = 3) -> Path:
    """The release's two layouts: artwork keeps pictures and questions in folders of their own."""
    for subtask in subtasks:
        folder = root / subtask
        texts, images = (folder / "questions_answers_YN", folder / "images") if subtask == "artwork" else (folder, folder)
        texts.mkdir(parents=True, exist_ok=True)
        images.mkdir(exist_ok=True)
        for n in range(pictures):
            (images / f"{n:04d}.{'png' if n % 2 else 'jpg'}").write_bytes(b"")
            # Some questions have two spaces before their ending.
            (texts / f"{n:04d}.txt").write_text(f"Is it {n}?{END}\tYes\nIs it not {n}? {END}\tNo\n")
    return root


def tables(folder: Path, asked: list[Any], said: dict[str, str], name: str = "{}") -> Path:
    folder.mkdir(exist_ok=True)
    for subtask in {e.type for e in asked}:
        rows = [
            [name.format(Path(e.images[0].name).name), e.question, e.references[0].capitalize(), said[e.id]]
            for e in asked
            if e.type == subtask
        ]
        (folder / f"{subtask}.txt").write_text("".join("\t".join(row) + "\n" for row in rows))
    return folder


def load(root: Path, **more: Any) -> list[Any]:
    return load_task(TaskConfig(task="mme", annotations=str(root), **more))


def refusal(*args: Any, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        score("mme", *args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_points_of_lavins_counters(tmp_path: Path) -> None:
    for subtask, (pictures, points) in LAVIN.items():
        # 2 N points / 100 = right answers + 2 x pairs = 4 x pairs + singles.
        pairs, singles = divmod(round(points * 2 * pictures / 100), 4)
        assert pairs + singles <= pictures
        rows = []
        for n in range(pictures):
            first, second = ("Yes", "No") if n < pairs else ("Yes", "Yes") if n < pairs + singles else ("No", "Yes")
            rows += [f"{n}.jpg\tIs it?{END}\tYes\t{first}\n", f"{n}.jpg\tIs it not?{END}\tNo\t{second}\n"]
        (tmp_path / f"{subtask}.txt").write_text("".join(rows))
    # A folder of results has its own ground truth.
    found = score("mme", tmp_path, tmp_path, bootstrap=50)
    # Stated with the evaluation tool's last digits, which depend on how points split into accuracy and accuracy+.
    assert found["metrics"] == pytest.approx({"perception": 963.6114445778312, "cognition": 249.64285714285714}, abs=1e-11)
    for subtask, (pictures, points) in LAVIN.items():
        part = found["breakdown"]["subtask"][subtask]
        assert part["points"] == pytest.approx(points, abs=1e-11) and part["n"] == 2 * pictures
        assert part["points"] == pytest.approx(100 * (part["accuracy"] + part["accuracy_plus"]), abs=1e-11)
    assert found["n"] == 2374 and found["settings"]["images"] == 1187 and "notes" not in found["settings"]
    assert tuple(found["breakdown"]["subtask"]) == (*PERCEPTION, *COGNITION)
    for name, (low, high) in found["ci95"].items():
        assert low < found["metrics"][name] < high < {"perception": 2000, "cognition": 800}[name]


def test_every_answer_right_is_all_points(tmp_path: Path) -> None:
    asked = load(benchmark(tmp_path, (*PERCEPTION, *COGNITION), 2))
    said = [{"question_id": e.id, "answer": e.references[0]} for e in asked]
    assert score("mme", said, tmp_path)["metrics"] == {"perception": 2000, "cognition": 800}


def test_a_pair_is_drawn_together(tmp_path: Path) -> None:
    root = benchmark(tmp_path, ("count",), 1)
    found = score("mme", [{"question_id": e.id, "answer": "yes"} for e in load(root)], root)
    # One picture, one right and one wrong: no draw can separate them.
    assert found["metrics"] == {"perception": 50} and found["ci95"]["perception"] == [50, 50]
    [note] = found["settings"]["notes"]
    assert note.startswith("perception is the sum of 1 of 10 subtasks: no existence, position, color, posters")


def test_forms_of_answers_agree(tmp_path: Path) -> None:
    root = benchmark(tmp_path / "mme")
    asked = load(root)
    said = {e.id: ("Yes" if n % 3 else "No, it is not") for n, e in enumerate(asked)}
    rows = [{"question_id": e.id, "answer": said[e.id]} for e in asked]
    by_id = score("mme", rows, root, bootstrap=20)
    forms = [
        tables(tmp_path / "results", asked, said),
        find_suite("mme").submit(tmp_path, asked, said),
        # LLaVA's converter writes the name of the question file.
        tables(tmp_path / "llava", [e for e in asked if e.type == "artwork"], said),
    ]
    tables(tmp_path / "llava", [e for e in asked if e.type == "existence"], said)
    text = (tmp_path / "llava/existence.txt").read_text()
    (tmp_path / "llava/existence.txt").write_text(text.replace(".jpg\t", ".txt\t").replace(".png\t", ".txt\t"))
    assert ".txt\t" in (tmp_path / "llava/existence.txt").read_text()
    for form in forms:
        assert score("mme", form, root, bootstrap=20) == by_id
    llava = [
        {
            "question_id": f"{e.type}/{Path(e.images[0].name).name}",
            "prompt": f"{bare_question(e.question)}\nAnswer the question using a single word or phrase.",
            "text": said[e.id],
        }
        for e in asked
    ]
    assert score("mme", llava[::-1], root, bootstrap=20) == by_id
    # The templates of the evaluation tool, without answers, serve as annotations.
    for file in sorted((tmp_path / "results").glob("*.txt")):
        rows_ = [line.split("\t")[:3] for line in file.read_text().splitlines()]
        (tmp_path / file.name).write_text("".join("\t".join(row) + "\n" for row in rows_))
    assert score("mme", forms[0], tmp_path, bootstrap=20) == by_id


def test_submission_keeps_the_question_and_cleans_the_answer(tmp_path: Path) -> None:
    asked = load(benchmark(tmp_path / "mme", ("existence",), 1))
    folder = find_suite("mme").submit(tmp_path, asked, {e.id: "Yes,\tit is.\nReally" for e in asked})
    assert (folder / "existence.txt").read_text() == (
        f"0000.jpg\tIs it 0?{END}\tYes\tYes, it is. Really\n0000.jpg\tIs it not 0? {END}\tNo\tYes, it is. Really\n"
    )


def test_rules_differ_and_the_unparsed_are_counted(tmp_path: Path) -> None:
    root = benchmark(tmp_path, ("existence",), 1)
    rows = [{"question_id": e.id, "answer": text} for e, text in zip(load(root), ("Y", "  no"), strict=True)]
    official, lmms = (score("mme", rows, root, rule=rule, bootstrap=0) for rule in ("official", "lmms"))
    assert official["metrics"]["perception"] == 50 and official["answers"]["unparsed"] == 1
    assert [row["parsed"] for row in official["per_sample"]] == ["other", "no"]
    assert lmms["metrics"]["perception"] == 200 and lmms["answers"]["unparsed"] == 0
    assert "known: official, lmms" in refusal(rows, root, rule="2017")


def test_half_a_pair_gives_no_points(tmp_path: Path) -> None:
    root = benchmark(tmp_path, ("existence",), 2)
    rows = [{"question_id": e.id, "answer": e.references[0]} for e in load(root)]
    found = score("mme", rows[:3], root, allow_missing=True, bootstrap=0)
    assert found["metrics"]["perception"] == 200 and found["settings"]["images"] == 1 and found["n"] == 3
    assert any("1 answers give no points" in note for note in found["settings"]["notes"])
    assert "no picture has answers to both" in refusal(rows[:1], root, allow_missing=True)
    assert "1 of 4 questions have no result: existence/0001.png/2" in refusal(rows[:3], root)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("\tNo\tok\n", "\tNo\n", "existence.txt:2: 3 columns, not picture"),
        ("\tNo\tok\n", "\tNo\to\tk\n", "existence.txt:2: 5 columns"),
        ("\tNo\tok\n", "\tYes\tok\n", "existence.txt:2: ground truth Yes of question existence/0000.jpg/2 is no"),
        ("\tNo\tok\n", "\tPerhaps\tok\n", "existence.txt:2: ground truth 'Perhaps'"),
        ("Is it not 0", "Is it 0", "existence.txt:2: a second answer to question existence/0000.jpg/1"),
        ("Is it not 0", "Is it 7", "existence.txt:2: answers to 1 unknown questions: existence/0000.jpg 'Is it 7? "),
    ],
)
def test_faults_of_a_result_file(tmp_path: Path, old: str, new: str, said: str) -> None:
    root = benchmark(tmp_path / "mme", ("existence",), 1)
    asked = load(root)
    folder = tables(tmp_path / "results", asked, {e.id: "ok" for e in asked})
    path = folder / "existence.txt"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert said in refusal(folder, root)


def test_faults_of_rows(tmp_path: Path) -> None:
    root = benchmark(tmp_path, ("existence",), 1)
    rows = [{"question_id": e.id, "answer": "yes"} for e in load(root)]
    assert "row 3: a second answer" in refusal([*rows, rows[0]], root)
    assert "row 3: answers to 1 unknown questions: existence/9" in refusal(
        [*rows, {"question_id": "existence/9", "answer": ""}], root
    )
    assert 'row 1: question existence/0000.jpg/1 has "answer" None' in refusal([{**rows[0], "answer": None}, rows[1]], root)
    assert "no rows" in refusal([], root)
    path = tmp_path / "cut.json"
    path.write_text(json.dumps(rows)[:-9])
    assert "cut.json:1:" in refusal(path, root) and "cut off" in refusal(path, root)
    (tmp_path / "none").mkdir()
    assert "no existence.txt" in refusal(tmp_path / "none", root)


def test_faults_of_the_benchmark(tmp_path: Path) -> None:
    root = benchmark(tmp_path / "mme", ("existence", "artwork"), 1)
    path = root / "existence/0000.txt"
    good = path.read_text()
    for text, said in (
        (good.split("\n")[0] + "\n", "0000.txt:1: 1 questions about existence/0000.jpg, not two"),
        (good.replace("\tYes", ""), "0000.txt:1: 1 columns, not question and answer"),
        (good.replace("\tYes", "\tSure"), "0000.txt:1: ground truth 'Sure'"),
        ("", "0000.txt: the file is empty"),
    ):
        path.write_text(text)
        assert said in refusal([], root)
    path.write_bytes(b"\xff")
    assert "byte 0 is not UTF-8" in refusal([], root)
    path.write_text(good)
    assert "no folder and no text file of a subtask" in refusal([], tmp_path)
    assert "MME's annotations are a folder" in refusal([], path)
    assert "questions does not apply to mme" in refusal([], root, "questions.json")
    (root / "artwork/images/0000.jpg").unlink()
    with pytest.raises(InputError, match=r"artwork/images: no picture of question artwork/0000\.jpg/1"):
        load(root)


def test_examples_ask_as_llava_does(tmp_path: Path) -> None:
    root = benchmark(tmp_path)
    short = "Answer the question using a single word or phrase."
    asked = load(root, prompt=f"{{question}}\n{short}")
    assert [e.id for e in asked[:3]] == ["existence/0000.jpg/1", "existence/0000.jpg/2", "existence/0001.png/1"]
    assert asked[1].prompt == f"Is it not 0?\n{short}" and asked[1].question == f"Is it not 0? {END}"
    assert asked[1].references == ["no"] and asked[1].type == "existence"
    assert asked[0].images == asked[1].images and Path(asked[0].images[0].name) == root / "existence/0000.jpg"
    assert Path(asked[-1].images[0].name) == root / "artwork/images/0002.jpg"
    assert [e.prompt for e in load(root, prompt="{question}{ending}")] == [e.question for e in asked]
    assert load(root)[0].prompt == "Is it 0?"
    # Pictures may lie elsewhere in the same layout.
    other = benchmark(tmp_path / "other")
    assert Path(load(root, image_root=str(other))[0].images[0].name) == other / "existence/0000.jpg"


def test_subtasks_on_one_coco_picture_are_drawn_together(tmp_path: Path) -> None:
    asked = ((f"Is it?{END}", "Yes"), (f"Is it not?{END}", "No"))

    def rows(names: list[str]) -> list[dict[str, Any]]:
        """Right in existence on the first picture and in count on the second, always yes on the others."""
        for subtask in ("existence", "count"):
            lines = [f"{name}\t{text}\t{truth}" for name in names for text, truth in asked]
            (tmp_path / f"{subtask}.txt").write_text("\n".join(lines) + "\n")
        right = (f"existence/{names[0]}/2", f"count/{names[1]}/2")
        keys = [f"{subtask}/{name}/{n}" for subtask in ("existence", "count") for name in names for n in (1, 2)]
        return [{"question_id": key, "answer": "no" if key in right else "yes"} for key in keys]

    found = score("mme", rows(["000000000001.jpg", "000000000002.jpg"]), tmp_path, bootstrap=100)
    assert found["metrics"]["perception"] == 250 and found["settings"]["images"] == 2
    # Whichever of the two is drawn, what one subtask gains the other loses.
    assert found["ci95"]["perception"] == [250, 250]
    # Names that every subtask counts from 1 mean other pictures in each.
    found = score("mme", rows(["0001.jpg", "0002.jpg"]), tmp_path, bootstrap=100)
    assert found["settings"]["images"] == 4 and found["ci95"]["perception"][0] < 250 < found["ci95"]["perception"][1]
