from __future__ import annotations

import os

import pytest

from mmkit.config import DecodingConfig
from mmkit.eval import reuse
from mmkit.eval.reuse import AnswerCache

GREEDY = DecodingConfig(max_new_tokens=8)


def test_answers_are_found_again_by_what_they_depend_on(tmp_path):
    key = AnswerCache.key(GREEDY, "what?", ["aa", "bb"])
    AnswerCache("model", "cpu", folder=tmp_path).add({key: "a dog\n"})
    again = AnswerCache("model", "cpu", folder=tmp_path)
    assert len(again) == 1 and again.get(key) == "a dog\n"
    others = [
        AnswerCache.key(DecodingConfig(max_new_tokens=9), "what?", ["aa", "bb"]),
        AnswerCache.key(DecodingConfig(max_new_tokens=8, num_beams=2), "what?", ["aa", "bb"]),
        AnswerCache.key(GREEDY, "What?", ["aa", "bb"]),
        AnswerCache.key(GREEDY, "what?", ["bb", "aa"]),
        AnswerCache.key(GREEDY, "what?", ["aa"]),
    ]
    assert len({key, *others}) == 6 and all(again.get(other) is None for other in others)


@pytest.mark.parametrize("change", ["model", "computer", "torch", "mmkit"])
def test_another_model_computer_or_version_has_answers_of_its_own(tmp_path, monkeypatch, change):
    AnswerCache("model", "cpu", folder=tmp_path).add({"k": "v"})
    if change == "torch":
        monkeypatch.setattr(reuse, "package_versions", lambda: {"torch": "9", "transformers": "9", "timm": "9"})
    elif change == "mmkit":
        monkeypatch.setattr("mmkit.__version__", "9")
    model, computer = ("model2" if change == "model" else "model"), ("cuda" if change == "computer" else "cpu")
    assert len(AnswerCache(model, computer, folder=tmp_path)) == 0


def test_a_cut_line_costs_its_own_answer_at_most(tmp_path):
    AnswerCache("m", "cpu", folder=tmp_path).add({"a": "1", "b": "2"})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    AnswerCache("m", "cpu", folder=tmp_path).add({"c": "3"})
    AnswerCache("m", "cpu", folder=tmp_path).add({"d": "4"})
    found = AnswerCache("m", "cpu", folder=tmp_path)
    assert found.get("a") == "1" and found.get("d") == "4" and found.get("b") is None


def test_two_processes_append_to_one_file(tmp_path):
    one, two = (AnswerCache("m", "cpu", folder=tmp_path) for _ in range(2))
    one.add({"a": "1"})
    two.add({"b": "2", "a": "1"})
    one.add({"a": "1"})
    assert len(AnswerCache("m", "cpu", folder=tmp_path)) == 2


def test_the_folder_is_bounded_and_what_was_used_last_stays(tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        cache = AnswerCache(name, "cpu", folder=tmp_path)
        cache.add({"k" * 32: "v" * 100})
        os.utime(cache._path, (1e9 - age, 1e9 - age))
    size = cache._path.stat().st_size
    AnswerCache("new", "cpu", folder=tmp_path, limit=2 * size).make_room()
    assert [len(AnswerCache(name, "cpu", folder=tmp_path)) for name in ("new", "middle", "old")] == [1, 1, 0]
    AnswerCache("new", "cpu", folder=tmp_path, limit=0).make_room()
    assert [len(AnswerCache(name, "cpu", folder=tmp_path)) for name in ("new", "middle")] == [1, 0], "its own file stays"
