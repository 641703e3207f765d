from __future__ import annotations

import json
import re

import pipeline
import pytest

from mmkit.config import load_recipe
from mmkit.errors import InputError
from mmkit.recipes import find_recipe, list_recipes
from mmkit.validate import check_parts


def check(name: str, *overrides: str) -> None:
    check_parts(load_recipe(find_recipe(name), overrides))


@pytest.mark.parametrize("name", [n for n in list_recipes() if n.startswith("demo")])
def test_the_demo_recipes_are_valid(name):
    check(name)


def test_an_unknown_architecture_is_named():
    with pytest.raises(InputError, match="vit_nonsense"):
        check("demo-superclass", "encoder.architecture=vit_nonsense")


def test_arguments_that_the_architecture_refuses():
    with pytest.raises(InputError, match="no_such_argument"):
        check("demo-superclass", "encoder.model_args={no_such_argument: 1}")


def test_deepspeed_settings_are_looked_at(tmp_path):
    with pytest.raises(InputError, match=r"train\.deepspeed: no DeepSpeed settings 'zero9'"):
        check("demo-llava-finetune", "train.deepspeed=zero9")
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    check("demo-llava-finetune", f"train.deepspeed={path}", "train.micro_batch_size=8")
    path.write_text(json.dumps({"train_batch_size": 4}))
    with pytest.raises(InputError, match="sets train_batch_size"):
        check("demo-llava-finetune", f"train.deepspeed={path}")


def test_a_prompt_without_its_question():
    with pytest.raises(InputError, match=r"tasks\.1\.prompt: prompt 'Answer!' has no \{question\}; put it in"):
        check("demo-eval-mllm", "tasks.1.prompt=Answer!")


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("ruel=2017", "unknown setting 'ruel'; did you mean rule?"),
        ("tokenizer=none", "tokenizer does not apply to vqav2; leave tokenizer out"),
        ("bootstrap=many", "bootstrap is a whole number from 0, not 'many'"),
        ("allow_missing=true", "settings.allow_missing: an evaluation answers all its questions; leave it out"),
        ("all_questions=q.json", "all_questions is for the server's file of a test set"),
        ("rule=lmsm", "rule: unknown rule 'lmsm'; known: official, 2017, always"),
    ],
)
def test_a_scorers_setting_is_refused_before_anything_is_asked(setting, told):
    with pytest.raises(InputError, match=re.escape(told)):
        check("vqav2-val", "model=m", f"tasks.0.settings.{setting}")


def test_the_ocr_setting_is_the_tasks_own():
    with pytest.raises(InputError, match="ocr in settings does not change the prompts; give ocr as a key of the task"):
        check("textvqa-val", "model=m", "tasks.0.settings.ocr=reference")


def test_settings_of_a_submission_go_with_a_test_set():
    check("vqav2-test-dev", "model=m")
    check("vqav2-val", "model=m", "tasks.0.settings={rule: 2017, bootstrap: 0, seed: 3}")


def test_the_command_starts_nothing(tmp_path, capsys):
    run = tmp_path / "run"
    assert pipeline.mmkit("validate", "demo-superclass", f"run={run}", "--show") == 0
    out = capsys.readouterr().out
    assert "stage: superclass" in out and out.endswith("valid: demo-superclass (stage superclass)\n") and not run.exists()
    assert pipeline.mmkit("validate", "demo-superclass", "train.learning_rate=1") == 2
    assert "unknown key 'train.learning_rate'" in capsys.readouterr().err
