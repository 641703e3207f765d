from __future__ import annotations

import pytest

from mmkit.data.skipped import LeftOut
from mmkit.errors import InputError
from mmkit.eval.parts import Part, Speed, part_files, read_parts, remove_parts, restore_parts
from mmkit.files import write_json
from mmkit.run import append_jsonl


def test_what_several_processes_and_starts_wrote(tmp_path):
    first, second = Part(tmp_path, 0), Part(tmp_path, 1)
    first.add("vqa", {1: "a", "x": "b\nc"})
    second.add("vqa", {2: "ü"}, cut={2}, from_cache=True)
    second.add("other", {1: "elsewhere"})
    second.leave_out("vqa", {3: LeftOut("p.jpg", "3", "is no picture")})
    first.took("vqa", Speed(10, 2.0, 3, 32))
    second.took("vqa", Speed(20, 5.0, 4, 16))
    Part(tmp_path, 0).took("vqa", Speed(10, 2.0, 1, 8))
    found = read_parts(tmp_path)
    assert found["vqa"].texts == {1: "a", "x": "b\nc", 2: "ü", 3: ""} and found["other"].texts == {1: "elsewhere"}
    assert found["vqa"].from_cache == found["vqa"].cut == {2} and found["vqa"].left_out == [
        LeftOut("p.jpg", "3", "is no picture")
    ]
    # Starts of one process follow each other, processes work at the same time.
    assert found["vqa"].speed() == {
        "answers_per_second": 20 / 4 + 20 / 5,
        "pictures_encoded": 8,
        "batch_size_used": 8,
        "processes": 2,
    }
    assert found["other"].speed() == {} and found["nothing"].texts == {}
    remove_parts(tmp_path)
    assert list(part_files(tmp_path)) == [] and not read_parts(tmp_path)


def test_a_lost_question_that_was_answered_since_is_not_lost(tmp_path):
    """Parts are read in the order of their names, which is not that of the starts."""
    left = [LeftOut("p.jpg", "1", "cannot be read (Input/output error)"), LeftOut("p.jpg", "1", "is no picture")]
    for rank in (0, 2):
        Part(tmp_path, rank).leave_out("vqa", {1: left[0], 2: left[0]})
    Part(tmp_path, 1).add("vqa", {1: "a dog"})
    Part(tmp_path, 2).leave_out("vqa", {2: left[1]})
    found = read_parts(tmp_path)["vqa"]
    assert found.texts == {1: "a dog", 2: ""} and found.lost == {2: left[1]}


def test_a_line_that_a_kill_cut_off_is_no_answer_and_is_repaired(tmp_path):
    part = Part(tmp_path, 0)
    part.add("vqa", {1: "a"})
    part.add("vqa", {2: "b"})
    whole = part.path.read_bytes()
    for end in range(len(whole)):
        part.path.write_bytes(whole[:end])
        kept = {} if end <= whole.index(b"\n") else {1: "a"}
        assert read_parts(tmp_path)["vqa"].texts == kept
        part.add("vqa", {3: "c"})
        assert read_parts(tmp_path)["vqa"].texts == {**kept, 3: "c"}


def test_answers_of_a_finished_run_come_back_where_the_same_is_asked(tmp_path):
    rows = [{"task": "vqa", "id": i, "prompt": f"Is it {i}?", "prediction": f"{i}", "score": {}} for i in (1, 2, "2")]
    rows[0]["cut"] = True
    append_jsonl(tmp_path / "predictions.jsonl", [*rows, {"task": "other", "id": 1, "prompt": "old", "prediction": "a"}])
    settings = {"batch_size": "auto", "cache": "dynamic", "answers_from_cache": 2, "speed": {"processes": 1}}
    score = {"settings": settings | {"rule": "official"}}
    write_json(tmp_path / "scores.json", {"tasks": {"vqa": score, "other": score}})
    # An answer that is empty for want of its picture is none; an id of that name with an answer has one.
    rows = [{"task": "lost", "id": i, "prompt": "?", "prediction": text} for i, text in ((1, ""), (2, ""), (3, "c"))]
    append_jsonl(tmp_path / "predictions.jsonl", rows)
    append_jsonl(tmp_path / "skipped.jsonl", [LeftOut("p.jpg", key, "is no picture").row() for key in ("1", "3")])
    # Of one task two questions are asked again; of the other one there is a new one, and an old one with another prompt.
    restore_parts(
        tmp_path, {"vqa": {1: "Is it 1?", "2": "Is it 2?"}, "other": {1: "new", 7: "more"}, "lost": {1: "?", 2: "?", 3: "?"}}
    )
    found = read_parts(tmp_path)
    assert found["vqa"].texts == {1: "1", "2": "2"} and found["vqa"].cut == {1}
    assert found["vqa"].settings == settings, "nothing of the rule"
    assert found["lost"].texts == {2: "", 3: "c"}
    assert found["other"].texts == {} and found["other"].settings == {}, "what is still to be asked tells its own"


@pytest.mark.parametrize(
    ("rows", "scores"),
    [(b'{"task": "vqa", \n', b'{"tasks": {}}'), (b"[1]\n", b'{"tasks": {}}'), (b"", b'{"tasks": {'), (b"", None)],
)
def test_a_finished_run_that_was_edited_is_not_scored_again(tmp_path, rows, scores):
    (tmp_path / "predictions.jsonl").write_bytes(rows)
    if scores is not None:
        (tmp_path / "scores.json").write_bytes(scores)
    with pytest.raises(InputError, match=r"cannot be scored again .*; start anew with --restart"):
        restore_parts(tmp_path, {"vqa": {}})
    assert not list(part_files(tmp_path))
