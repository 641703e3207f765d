from __future__ import annotations

import json
from pathlib import Path

import pipeline
import pytest

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.examples import Example, Picture
from mmkit.eval.names import BUILT_IN
from mmkit.eval.score import check_task_settings
from mmkit.eval.suites import find_suite
from mmkit.eval.tasks import check_places, load_task, shuffle_pictures


def config(task: str, **more) -> TaskConfig:
    world = pipeline.root() / "world"
    files = {
        "coco-caption": {"annotations": "captions_heldout.json"},
        "vqav2": {"annotations": "vqa_heldout_annotations.json", "questions": "vqa_heldout_questions.json"},
        "textvqa": {"annotations": "textvqa_heldout.json"},
    }[task]
    named = {"image_name": "{:012d}.jpg"} if task == "textvqa" else {}
    paths = {key: str(world / name) for key, name in files.items()}
    return TaskConfig(**{"task": task, "image_root": str(world / "images" / "heldout"), **paths, **named, **more})


def test_captions_are_one_example_a_picture():
    examples = load_task(config("coco-caption"))
    assert [Path(e.images[0].name) for e in examples] == pipeline.pictures() and all(len(e.references) == 5 for e in examples)
    assert {(e.prompt, e.question) for e in examples} == {("Describe the picture.", None)}
    assert {e.prompt for e in load_task(config("coco-caption", prompt="Describe it."))} == {"Describe it."}


def test_questions_become_prompts():
    config_ = config("vqav2", prompt="{question}\nShort answer.")
    examples = load_task(config_)
    asked = {q["question_id"]: q for q in json.loads(Path(config_.questions).read_text())["questions"]}
    assert len(examples) == len(asked) and len({e.images for e in examples}) > 1
    for e in examples:
        assert e.question == asked[e.id]["question"] and e.prompt == f"{e.question}\nShort answer."
        assert Path(e.images[0].name).name == f"{asked[e.id]['image_id']:012d}.jpg" and len(e.references) == 10


def test_ocr_tokens_go_on_a_line_after_the_question():
    plain, with_ocr = (load_task(config("textvqa", ocr=ocr, prompt="{question} Short.")) for ocr in ("none", "reference"))
    rows = {r["question_id"]: r for r in json.loads((pipeline.root() / "world" / "textvqa_heldout.json").read_text())["data"]}
    assert plain and len(plain) == len(with_ocr)
    for a, b in zip(plain, with_ocr, strict=True):
        assert a.prompt == f"{a.question} Short."
        assert b.prompt == f"{a.question}\nReference OCR token: {', '.join(rows[a.id]['ocr_tokens'])} Short."
        assert a.question == b.question


def test_a_file_without_ocr_is_refused(tmp_path):
    data = json.loads((pipeline.root() / "world" / "textvqa_heldout.json").read_text())
    for row in data["data"]:
        del row["ocr_tokens"]
    (tmp_path / "no_ocr.json").write_text(json.dumps(data))
    without = config("textvqa", annotations=str(tmp_path / "no_ocr.json"))
    assert load_task(without)
    with pytest.raises(InputError, match=r"no_ocr\.json: question \d+ has no ocr_tokens; use ocr=none"):
        load_task(without.model_copy(update={"ocr": "reference"}))


def test_settings_that_scoring_would_refuse_are_refused_before_the_files_are_read():
    with pytest.raises(InputError, match=r"unknown setting 'ruel'; did you mean rule\?"):
        load_task(config("vqav2", settings={"ruel": "2017"}, annotations="absent.json"))


def test_limit_takes_the_first():
    assert load_task(config("vqav2", limit=3)) == load_task(config("vqav2"))[:3]


@pytest.mark.parametrize("pattern", ["{:012q}.jpg", "{5}.jpg", "../{}.jpg", "{name}.jpg"])
def test_a_bad_image_name_is_refused(pattern):
    with pytest.raises(InputError, match=r"image_name: no file name for image .*; use a pattern"):
        load_task(config("textvqa", image_name=pattern))


def test_blind_leaves_no_picture_in_its_place():
    examples = load_task(config("vqav2"))
    shown = shuffle_pictures(examples, 0)
    assert [e.id for e in shown] == [e.id for e in examples] and [e.prompt for e in shown] == [e.prompt for e in examples]
    assert all(a.images != b.images for a, b in zip(examples, shown, strict=True))
    # All questions about a picture see the same other one, and every picture is shown.
    other = {a.images: b.images for a, b in zip(examples, shown, strict=True)}
    assert all(other[a.images] == b.images for a, b in zip(examples, shown, strict=True))
    assert set(other.values()) == set(other)
    assert shuffle_pictures(examples, 0) == shown != shuffle_pictures(examples, 1)


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_blind_for_any_seed(count, seed):
    examples = [Example(i, (Picture(f"{i % count}.jpg"),), "", None, []) for i in range(2 * count)]
    assert all(a.images != b.images for a, b in zip(examples, shuffle_pictures(examples, seed), strict=True))


def test_blind_needs_two_pictures():
    with pytest.raises(InputError, match="blind needs at least two pictures"):
        shuffle_pictures([Example(1, (Picture("a.jpg"),), "", None, []), Example(2, (Picture("a.jpg"),), "", None, [])], 0)


def test_result_rows_are_the_official_ones():
    asked = [Example(3, (), "", None, [])]
    assert find_suite("coco-caption").rows(asked, {3: "a dog"}) == [{"image_id": 3, "caption": "a dog"}]
    for name in ("vqav2", "textvqa"):
        assert find_suite(name).rows(asked, {3: "yes"}) == [{"question_id": 3, "answer": "yes"}]


def test_vqav2_needs_its_questions():
    with pytest.raises(InputError, match=r"vqav2 needs questions; give questions=PATH"):
        load_task(config("vqav2", questions=None))


@pytest.mark.parametrize(
    ("suite", "option"),
    [(name, option) for name in BUILT_IN for option in find_suite(name).options if option not in ("choices", "split")],
)
def test_values_of_settings_are_refused_before_anything_is_asked(suite, option):
    with pytest.raises(InputError, match=f"^{option}: "):
        check_task_settings(TaskConfig(task=suite, annotations="a.json", settings={option: "no-such"}))


def test_a_prompt_without_its_question_is_refused():
    with pytest.raises(InputError, match=r"prompt: prompt 'Answer!' has no \{question\}; put it in"):
        load_task(config("vqav2", prompt="Answer!"))


def test_all_that_is_missing_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").touch()
    (tmp_path / "pope").mkdir()
    tasks = [
        TaskConfig(task="vqav2", annotations="a.json", questions="q.json", image_root="pictures"),
        TaskConfig(task="pope", annotations="pope"),
        TaskConfig(task="mme", annotations="/nowhere/mme"),
        TaskConfig(task="vqav2", questions="a.json"),
    ]
    with pytest.raises(InputError) as caught:
        check_places(tasks)
    missing = "tasks.0.questions q.json, tasks.0.image_root pictures, tasks.2.annotations /nowhere/mme"
    assert f"tasks: no such file or folder: {missing}; set DATA" in str(caught.value) and str(tmp_path) in str(caught.value)
    check_places(tasks[1:2] + tasks[3:])


def test_what_scoring_would_refuse_is_refused_before_anything_is_asked(tmp_path, monkeypatch):
    def write(name, data):
        (tmp_path / name).write_text(json.dumps(data))
        return str(tmp_path / name)

    def told(part, task, **more):
        with pytest.raises(InputError, match=part):
            load_task(TaskConfig(task=task, image_root=str(tmp_path), **more))

    own = write("own.json", [{"id": 1, "question": "?", "answers": ["red"]}])
    told("metric=vqa needs 10 answers a question", "generic", annotations=own, settings={"metric": "vqa"})
    told("no answer has a number for question 1", "generic", annotations=own, settings={"metric": "numeric"})
    question = {"question": "?", "imageId": "1", "answer": "x", "isBalanced": True, "groups": {}}
    question["types"] = dict.fromkeys(("structural", "semantic", "detailed"), "x")
    gqa = write("gqa.json", {"a": question})
    told("choices file: No such file", "gqa", annotations=gqa, settings={"choices": str(tmp_path / "none.json")})
    told("no lists .* for a", "gqa", annotations=gqa, settings={"choices": write("choices.json", {"b": {}})})
    told("no question is balanced", "gqa", annotations=write("odd.json", {"a": {**question, "isBalanced": False}}))
    asked = write("dev.json", {"questions": [{"question_id": 1, "image_id": 1, "question": "?"}]})
    other = write("whole.json", {"questions": [{"question_id": 2, "image_id": 1, "question": "?"}]})
    told("1 questions were asked that are not in all_questions: 1", "vqav2", questions=asked, settings={"all_questions": other})
    told("cannot read the questions", "vqav2", questions=asked, settings={"all_questions": str(tmp_path / "none.json")})
    # No score is made of a test set, and its rule is a slip all the same.
    told("unknown rule 'lmsm'", "vqav2", questions=asked, settings={"rule": "lmsm"})
    captions = write("cap.json", {"images": [{"id": 1}], "annotations": [{"image_id": 1, "id": 1, "caption": "a"}]})
    assert len(load_task(TaskConfig(task="coco-caption", image_root="p", annotations=captions))) == 1
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    for setting in ({"metrics": "bleu,meteor"}, {"metrics": "spice"}, {"tokenizer": "java"}):
        told("no java on the PATH", "coco-caption", annotations=captions, settings=setting)
