"""Task files of the question-answering suites: they validate, score with the settings that they name, and cite their figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from mmkit.config import TaskConfig
from mmkit.eval.score import COMMON
from mmkit.eval.suites import find_suite
from mmkit.recipes import recipe_folders

FOLDER = recipe_folders()["eval"] / "tasks"
NAMES = ["vqav2-val", "vqav2-test-dev", "textvqa-val", "textvqa-val-ocr", "vizwiz-val", "gqa-testdev-balanced"]
SHORT = "\nAnswer the question using a single word or phrase."


def load(name: str) -> dict[str, Any]:
    plain = OmegaConf.to_container(OmegaConf.create(yaml.safe_load((FOLDER / f"{name}.yaml").read_text())), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


@pytest.mark.parametrize("name", NAMES)
def test_task(name: str) -> None:
    data = load(name)
    assert data["name"] == name
    for row in data["published"]:
        assert set(row) == {"system", "metrics", "source", "conditions"}
        assert all(0 < value < 2 for value in row["metrics"].values()) and row["source"]
    config = TaskConfig(**data)
    suite = find_suite(config.task)
    # A test set takes the settings of its submission, the others those of the scorer.
    known = suite.submit_options if config.annotations is None else (*suite.options, *COMMON)
    assert set(config.settings) <= set(known)
    assert config.prompt.startswith("{question}") and config.prompt.endswith(SHORT)
    assert (config.generation.max_new_tokens, config.generation.num_beams) == (128, 1)
    paths = [config.annotations, config.questions, config.image_root]
    assert all(path.startswith("data/") for path in paths if path is not None)


@pytest.mark.parametrize("name", NAMES)
def test_head(name: str) -> None:
    text = Path(FOLDER / f"{name}.yaml").read_text()
    for word in ("launch", "override", "hardware", "time", "score", "Data:"):
        assert f"# {word}" in text or f"#   {word}" in text, word
    assert f"mmkit eval {name} model=RUN" in text


def test_ocr_modes_are_two_tasks() -> None:
    plain, reference = load("textvqa-val"), load("textvqa-val-ocr")
    assert (plain["ocr"], reference["ocr"]) == ("none", "reference")
    assert (
        load("vizwiz-val")["prompt"]
        == "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT
    )
    assert "annotations" not in load("vqav2-test-dev")
