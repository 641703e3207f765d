"""Tasks by name in an evaluation's recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmkit.config import EvalRecipe, dump_recipe, load_recipe
from mmkit.errors import InputError
from mmkit.recipes import find_recipe, list_tasks

TASK = """
task: vqav2
name: mine
annotations: ${oc.env:MMKIT_TEST_DATA,data}/a.json
questions: q.json
image_root: pictures
prompt: "{question} Short."
generation: {max_new_tokens: 9, num_beams: 2}
published: [{system: Paper, metrics: {accuracy: 0.7}, source: table 1}]
"""


def write(folder: Path, tasks: str, **files: str) -> Path:
    for name, text in {"mine": TASK, **files}.items():
        (folder / f"{name}.yaml").write_text(text)
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"stage: eval\nrun: runs/x\nmodel: m\ntasks: {tasks}\n")
    return recipe


def load(path: Path, *overrides: str) -> EvalRecipe:
    recipe = load_recipe(path, overrides)
    assert isinstance(recipe, EvalRecipe)
    return recipe


def test_a_named_task_is_put_in(tmp_path, monkeypatch):
    monkeypatch.setenv("MMKIT_TEST_DATA", "/elsewhere")
    recipe = load(write(tmp_path, "[mine.yaml]"))
    task = recipe.tasks[0]
    assert (task.task, task.name, task.annotations, task.generation.max_new_tokens) == ("vqav2", "mine", "/elsewhere/a.json", 9)
    assert task.published[0].metrics == {"accuracy": 0.7} and task.published[0].conditions == ""
    # What ran stands in the recipe whole, so that it does not depend on a file that may change.
    (tmp_path / "whole.yaml").write_text(dump_recipe(recipe))
    monkeypatch.delenv("MMKIT_TEST_DATA")
    assert load(tmp_path / "whole.yaml") == recipe and "from" not in dump_recipe(recipe)


def test_keys_beside_from_win_and_sections_merge(tmp_path):
    task = load(write(tmp_path, "[{from: mine.yaml, name: other, limit: 3, generation: {num_beams: 1}}]")).tasks[0]
    assert (task.name, task.limit, task.generation.num_beams, task.generation.max_new_tokens) == ("other", 3, 1, 9)
    assert task.prompt == "{question} Short."


def test_overrides_reach_into_named_tasks(tmp_path):
    path = write(tmp_path, "[mine.yaml, {from: mine.yaml, name: two}]")
    recipe = load(path, "tasks.1.limit=5", "tasks.0.generation.num_beams=4")
    assert [t.limit for t in recipe.tasks] == [None, 5] and recipe.tasks[0].generation.num_beams == 4
    recipe = load(path, f"tasks=[{tmp_path}/mine.yaml]", "tasks.0.limit=7")
    assert [(t.name, t.limit) for t in recipe.tasks] == [("mine", 7)]


def test_a_task_may_build_on_another(tmp_path):
    path = write(tmp_path, "[short.yaml]", short="from: mine.yaml\nlimit: 2\npublished: []\n")
    task = load(path).tasks[0]
    assert (task.task, task.limit, task.published) == ("vqav2", 2, ())


def test_a_task_alone_is_an_evaluation(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", "here")
    write(tmp_path, "[]")
    recipe = load(tmp_path / "mine.yaml", "model=runs/m", "tasks.0.limit=4")
    assert (recipe.run, recipe.model, recipe.tasks[0].limit) == ("here/eval-mine", "runs/m", 4)
    with pytest.raises(InputError, match="key 'model' is missing"):
        load(tmp_path / "mine.yaml")


@pytest.mark.parametrize("name", list_tasks())
def test_shipped_tasks_are_evaluations(name):
    recipe = load(find_recipe(name), "model=m")
    assert recipe.tasks[0].name == name and recipe.run.endswith(f"eval-{name}")


@pytest.mark.parametrize(
    ("tasks", "files", "message"),
    [
        ("[coco-karpathy-tset]", {}, "no task 'coco-karpathy-tset'; did you mean 'coco-karpathy-test'"),
        ("[vqav2]", {}, r"'vqav2' is a suite .*; tasks of it: vqav2-test-dev, vqav2-val"),
        ("[{from: nowhere.yaml}]", {}, "no task 'nowhere.yaml'; "),
        ("[bad.yaml]", {"bad": "task: ["}, r"bad.yaml: cannot read the task"),
        ("[recipe.yaml]", {}, r"recipe.yaml: not a task"),
        ("[list.yaml]", {"list": "- 1"}, r"list.yaml: not a task"),
        ("[a.yaml]", {"a": "from: b.yaml", "b": "from: a.yaml"}, "leads back to itself"),
        ("[{from: mine.yaml, limt: 3}]", {}, "unknown key 'tasks.0.limt'; did you mean tasks.0.limit"),
        ("[{from: mine.yaml, task: vqa2}]", {}, "no such suite; did you mean vqav2"),
        ("[5]", {}, "tasks.0"),
        ("[{from: mine.yaml, published: [{system: P, metrics: {}, source: t}]}]", {}, "tasks.0.published.0.metrics"),
    ],
)
def test_faults_are_named(tmp_path, tasks, files, message):
    with pytest.raises(InputError, match=message):
        load(write(tmp_path, tasks, **files))


def test_a_fault_in_a_task_is_the_only_one_told(tmp_path):
    with pytest.raises(InputError) as error:
        load(write(tmp_path, "[{from: mine.yaml, limt: 3}]"))
    assert "should not be empty" not in str(error.value) and "pictures" not in str(error.value)
    with pytest.raises(InputError, match=r"tasks=.*: should not be empty"):
        load(write(tmp_path, "[]"))
