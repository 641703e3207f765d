"""docs/suites.md names every suite with all its settings, their values and their defaults."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from mmkit.eval.names import BUILT_IN
from mmkit.eval.scorers import gqa, own, ptb, vqa
from mmkit.eval.scorers.choice import SCIENCEQA_RULES
from mmkit.eval.scorers.families import FAMILIES
from mmkit.eval.scorers.yesno import MME_RULES, POPE_RULES
from mmkit.eval.suites import find_suite, mmmu, scienceqa, textvqa, vizwiz

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "suites.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
VALUES: dict[tuple[str, str], Iterable[str]] = {
    ("coco-caption", "tokenizer"): ptb.TOKENIZERS,
    ("coco-caption", "metrics"): FAMILIES,
    ("vqav2", "rule"): vqa.RULES,
    ("textvqa", "ocr"): textvqa.OCR,
    ("textvqa", "anls"): ("true", "false"),
    ("vizwiz", "rule"): vizwiz.RULES,
    ("gqa", "rule"): gqa.RULES,
    ("scienceqa", "rule"): SCIENCEQA_RULES,
    ("scienceqa", "subset"): scienceqa.SUBSETS,
    ("pope", "rule"): POPE_RULES,
    ("mme", "rule"): MME_RULES,
    ("mmmu", "split"): mmmu.SPLITS,
    ("generic", "metric"): own.metric_names(),
}


def test_every_suite_has_a_section():
    assert list(SECTIONS) == list(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_setting_has_a_line_and_no_other(name):
    suite, section = find_suite(name), SECTIONS[name]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.M)) == set(suite.options), name
    assert all(f"`{key}=" in section for key in suite.submit_options)
    assert ("| submission |" in section) == (suite.submit is not None)


@pytest.mark.parametrize(("name", "option"), VALUES)
def test_every_value_is_told(name, option):
    (line,) = re.findall(rf"^\| `{option}` \| (.*) \|$", SECTIONS[name], re.M)
    words = set(re.findall(r"\w+", line))
    assert set(VALUES[name, option]) <= words
    # One default, and it is a value.
    (default,) = re.findall(r"\*\*(.*?)\*\*", line)
    assert set(default.split(",")) <= set(VALUES[name, option])


def test_the_settings_with_values_are_all_looked_at():
    free = {("gqa", "choices"), ("scienceqa", "split"), ("generic", "tolerance")}
    assert set(VALUES) | free == {(name, option) for name in BUILT_IN for option in find_suite(name).options}
