"""What may change between two starts of one run directory, and what is told of what may not."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import pytest

from mmkit.config import STAGES, EvalRecipe, Recipe, check_recipe, dump_recipe
from mmkit.config.changes import _HOW, _SCORING, changes
from mmkit.config.load import _keys

LLAVA: dict[str, Any] = {
    "stage": "llava",
    "run": "runs/a",
    "model": "runs/before",
    "data": {"train": "chat.json"},
    "template": "plain",
    "tune": "full",
    "train": {"batch_size": 8, "steps": 4, "lr": 0.001},
}
CLIP: dict[str, Any] = {
    "stage": "clip",
    "run": "runs/c",
    "encoder": {"architecture": "vit_tiny_patch16_224"},
    "data": {"train": "pairs.jsonl"},
    "train": {"batch_size": 8, "steps": 4, "lr": 0.001},
}
SUPERCLASS = CLIP | {"stage": "superclass"}
FINETUNE = LLAVA | {"stage": "finetune", "encoder": "runs/a", "data": {"train": "train", "test": "test"}}
for key in ("model", "template", "tune"):
    del FINETUNE[key]
EVAL: dict[str, Any] = {
    "stage": "eval",
    "run": "runs/e",
    "model": "runs/a",
    "tasks": [{"task": "vqav2", "annotations": "a.json", "questions": "q.json", "prompt": "{question}\n" + "shortly " * 20}],
}


def with_keys(plain: dict[str, Any], **new: Any) -> Recipe:
    """The recipe with other values; keys have two underscores for a dot."""
    copy = check_recipe(plain, where="test").model_dump(mode="json")
    for key, value in new.items():
        *path, last = [int(part) if part.isdigit() else part for part in key.split("__")]
        section: Any = copy
        for part in path:
            section = section[part]
        section[last] = value
    return check_recipe(copy, where="test")


def kinds(plain: dict[str, Any], **new: Any) -> dict[str, str]:
    found = changes(dump_recipe(check_recipe(plain, where="test")), dump_recipe(with_keys(plain, **new)))
    return {change.key: change.kind for change in found}


def test_equal_recipes_have_no_changes():
    assert kinds(LLAVA) == kinds(EVAL) == {}


@pytest.mark.parametrize(
    ("plain", "new"),
    [
        (LLAVA, {"train__deepspeed": "zero3"}),
        (LLAVA, {"train__micro_batch_size": 2}),
        (SUPERCLASS, {"train__micro_batch_size": 2}),
        (FINETUNE, {"train__micro_batch_size": 2}),
        (LLAVA, {"train__keep_checkpoints": 7}),
        (LLAVA, {"data__workers": 0}),
        (LLAVA, {"data__prefetch": 5}),
        (LLAVA, {"data__timeout": 5}),
        (LLAVA, {"data__cache": "elsewhere"}),
        (CLIP, {"data__cache_gib": 3}),
        (LLAVA, {"track__kind": "none"}),
        (LLAVA, {"run": "runs/moved"}),
        (EVAL, {"tasks__0__generation__batch_size": 4}),
        (EVAL, {"tasks__0__generation__cache": "static"}),
        (EVAL, {"tasks__0__generation__reuse": False}),
    ],
)
def test_how_the_work_is_done_may_change(plain, new):
    assert set(kinds(plain, **new).values()) == {"how"}


@pytest.mark.parametrize(
    "new",
    [
        {"system": "ours"},
        {"max_skipped": 0.5},
        {"tasks__0__settings": {"rule": "2017"}},
        {"tasks__0__published": [{"system": "LLaVA", "metrics": {"accuracy": 0.78}, "source": "Table 3"}]},
    ],
)
def test_scoring_of_an_evaluation_may_change(new):
    assert set(kinds(EVAL, **new).values()) == {"scoring"}


@pytest.mark.parametrize(
    ("plain", "new"),
    [
        (LLAVA, {"train__lr": 0.1}),
        # Its label is in the manifests of what was made from it.
        (LLAVA, {"system": "ours"}),
        (LLAVA, {"data__limit": 5}),
        (SUPERCLASS | {"loss": {"kind": "two_way"}}, {"train__micro_batch_size": 2}),
        (FINETUNE | {"mixup": 0.8}, {"train__micro_batch_size": 2}),
        (FINETUNE | {"cutmix": 1.0}, {"train__micro_batch_size": 2}),
        (EVAL, {"tasks__0__prompt": "{question}"}),
        (EVAL, {"tasks__0__generation__max_new_tokens": 3}),
        (EVAL, {"tasks__0__limit": 3}),
        (EVAL, {"tasks__0__annotations": "b.json"}),
        (EVAL, {"blind": True}),
        (EVAL, {"model": "runs/b"}),
    ],
)
def test_the_experiment_may_not(plain, new):
    assert set(kinds(plain, **new).values()) == {"experiment"}


def test_a_change_is_told_whole_by_its_key():
    before = dump_recipe(check_recipe(EVAL, where="test"))
    (change,) = changes(before, dump_recipe(with_keys(EVAL, tasks__0__prompt="{question}")))
    # YAML would have wrapped it, and a diff of lines shown its end alone.
    assert str(change) == f"tasks.0.prompt: {EVAL['tasks'][0]['prompt']!r} -> '{{question}}'"
    # As an older mmkit wrote it, without a key that is new.
    lines = [line for line in before.splitlines() if "reuse" not in line]
    (change,) = changes("\n".join(lines), before)
    assert (str(change), change.kind) == ("tasks.0.generation.reuse: absent -> True", "how")


def test_numbers_and_truth_are_told_apart():
    assert [str(c) for c in changes("a: 1\nb: [2]", "a: true\nb: [2, 3]")] == ["a: 1 -> True", "b.1: absent -> 3"]


def test_every_pattern_names_a_key_of_the_schema():
    known = {key.replace("tasks.", "tasks.0.") for schema in STAGES.values() for key in _keys(schema)}
    for pattern in (*_HOW, *_SCORING):
        assert any(fnmatch.fnmatchcase(key, pattern) for key in known), pattern
    assert {"system", "max_skipped"} <= set(EvalRecipe.model_fields)


def test_the_order_is_that_of_the_recipe(tmp_path: Path):
    found = kinds(LLAVA, train__lr=0.5, train__steps=9, data__limit=3)
    assert list(found) == ["data.limit", "train.steps", "train.lr"]
