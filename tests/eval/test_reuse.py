from __future__ import annotations

import os

import pytest

from mmkit.config import DecodingConfig
from mmkit.eval import reuse
from mmkit.eval.reuse import AnswerCache
from mmkit.files import write_json
from mmkit.run import Parent, resolve_parent

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


@pytest.mark.parametrize("change", ["model", "computer", "torch", "tokenizers", "pillow", "mmkit"])
def test_another_model_computer_or_version_has_answers_of_its_own(tmp_path, monkeypatch, change):
    AnswerCache("model", "cpu", folder=tmp_path).add({"k": "v"})
    assert len(AnswerCache("model", "cpu", folder=tmp_path)) == 1
    versions = reuse.package_versions()
    # Pillow decodes and resizes what the model sees.
    assert versions["pillow"] != "absent" != versions["tokenizers"]
    monkeypatch.setattr(reuse, "package_versions", lambda: versions | {change: "9"})
    if change == "mmkit":
        monkeypatch.setattr(reuse, "_code", lambda: "a line was changed in a checkout, the version was not")
    model, computer = ("model2" if change == "model" else "model"), ("cuda" if change == "computer" else "cpu")
    assert len(AnswerCache(model, computer, folder=tmp_path)) == 0


def test_mmkits_own_code_is_part_of_the_name(tmp_path, monkeypatch):
    package = tmp_path / "mmkit"
    (package / "eval").mkdir(parents=True)
    monkeypatch.setattr(reuse, "__file__", str(package / "eval" / "reuse.py"))
    seen = set()
    for name, text in (("eval/run.py", "a"), ("eval/run.py", "b"), ("models.py", "b")):
        (package / name).write_text(text)
        reuse._code.cache_clear()
        seen.add(reuse._code())
    reuse._code.cache_clear()
    assert len(seen) == 3


def test_an_edited_model_is_another_model(tmp_path, monkeypatch):
    """A run's fingerprint is from when it was written; who edits its template afterwards gets new answers."""
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    write_json(run / "manifest.json", {"status": "done", "product": "0" * 32})
    (run / "model" / "config.json").write_text("{}")
    (run / "model" / "chat_template.jinja").write_text("USER: {{ q }}")
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(b"0" * 64)
    monkeypatch.setattr(reuse, "_WEIGHTS", 32)
    before = reuse.model_fingerprint(resolve_parent("model", str(run)))
    assert before == reuse.model_fingerprint(resolve_parent("model", str(run)))
    (run / "model" / "chat_template.jinja").write_text("Human: {{ q }}")
    edited = reuse.model_fingerprint(resolve_parent("model", str(run)))
    (run / "model" / "chat_template.jinja").write_text("USER: {{ q }}")
    assert reuse.model_fingerprint(resolve_parent("model", str(run))) == before != edited
    # Weights by size and time: other ones of the same size.
    weights.write_bytes(b"1" * 64)
    os.utime(weights, (1e9, 1e9))
    assert reuse.model_fingerprint(resolve_parent("model", str(run))) not in (before, edited)
    # A folder without a run is hashed whenever it is named.
    assert reuse.model_fingerprint(Parent("model", "x", "abc", tmp_path)) == "abc"


def test_half_of_one_answer_behind_the_key_of_another_is_not_believed(tmp_path):
    AnswerCache("m", "cpu", folder=tmp_path).add({"a": "no dog", "b": "yes"})
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text().replace("no dog", "a dog"))
    found = AnswerCache("m", "cpu", folder=tmp_path)
    assert found.get("a") is None and found.get("b") == "yes"


@pytest.mark.parametrize("fault", ["no folder", "full"])
def test_answers_that_cannot_be_kept_do_not_end_the_evaluation(tmp_path, monkeypatch, caplog, fault):
    folder = tmp_path / "answers"
    if fault == "no folder":
        folder.write_text("in the way")
    else:
        folder.mkdir()

        # A device on which nothing can be written.
        monkeypatch.setattr(reuse, "hash_text", lambda *parts: "x")
        (folder / "x.jsonl").symlink_to("/dev/full")
        monkeypatch.setattr(reuse, "_read", lambda path: [])
    cache = AnswerCache("m", "cpu", folder=folder)
    for number in range(3):
        cache.add({str(number): "yes"})
    assert cache.get("2") == "yes"
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and "answers are not kept for later runs" in told[0] and "generation.reuse=false" in told[0]


def test_a_cut_line_costs_its_own_answer_at_most(tmp_path):
    AnswerCache("m", "cpu", folder=tmp_path).add({"a": "1", "b": "2"})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    AnswerCache("m", "cpu", folder=tmp_path).add({"c": "3"})
    AnswerCache("m", "cpu", folder=tmp_path).add({"d": "4"})
    found = AnswerCache("m", "cpu", folder=tmp_path)
    assert found.get("a") == "1" and found.get("d") == "4" and found.get("b") is None


def test_whether_an_answer_was_cut_is_kept_with_it(tmp_path):
    AnswerCache("m", "cpu", folder=tmp_path).add({"a": "no", "b": "because the"}, cut={"b"})
    found = AnswerCache("m", "cpu", folder=tmp_path)
    assert [found.get(key) for key in "ab"] == ["no", "because the"]
    assert [found.cut(key) for key in "abc"] == [False, True, False]


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
