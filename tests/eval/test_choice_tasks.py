"""The shipped multiple-choice and yes/no tasks: they fit their suites, ask as LLaVA does, and name published figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmkit.config import TaskConfig
from mmkit.eval.suites import find_suite, suite_names

FOLDER = Path(__file__).parents[2] / "eval" / "recipes" / "tasks"
LETTER = "\nAnswer with the option's letter from the given choices directly."
WORD = "\nAnswer the question using a single word or phrase."
TASKS = {
    "scienceqa-test": ("scienceqa", LETTER, 1024),
    "scienceqa-img-test": ("scienceqa", LETTER, 1024),
    "pope": ("pope", WORD, 128),
    "mme": ("mme", WORD, 128),
    "mmbench-en-dev": ("mmbench", LETTER, 1024),
    "mmbench-cn-dev": ("mmbench", "\n请直接回答选项字母。", 1024),
    "mmmu-val": ("mmmu", "\n{ending}", 128),
}
# LLaVA-1.5 7B in docs/MODEL_ZOO (MMMU: the official example output of 13B).
PUBLISHED = {
    "scienceqa-test": {"accuracy_img": 0.668},
    "scienceqa-img-test": {"accuracy": 0.668},
    "pope": {"f1": 0.859},
    "mme": {"perception": 1510.7},
    "mmbench-en-dev": {"accuracy": 0.643},
    "mmbench-cn-dev": {"accuracy": 0.583},
    "mmmu-val": {"accuracy_official_seed42": 0.367},
}


def read(name: str) -> dict[str, Any]:
    found = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", TASKS)
def test_task_fits_its_suite(name: str) -> None:
    found = read(name)
    assert found["name"] == name
    suite, ending, tokens = TASKS[name]
    config = TaskConfig(**{key: value for key, value in found.items() if key in TaskConfig.model_fields})
    # Only what names and places the row in the report may be unknown to the task itself.
    assert set(found) - set(TaskConfig.model_fields) <= {"name", "published"}
    assert config.task == suite and config.prompt.endswith(ending)
    assert config.generation.max_new_tokens == tokens and config.generation.num_beams == 1
    assert set(config.settings) <= set(find_suite(suite).options)


@pytest.mark.parametrize("name", TASKS)
def test_published_figures_say_where_they_are_from(name: str) -> None:
    rows = read(name)["published"]
    assert rows[0]["metrics"] == PUBLISHED[name]
    assert all(row["system"] and row["source"] and row["conditions"] for row in rows)


def test_suites_are_known() -> None:
    assert {suite for suite, _, _ in TASKS.values()} <= set(suite_names())
