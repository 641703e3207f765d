from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pipeline
import pytest
import yaml
from PIL import Image

import mmkit
from mmkit.eval import parts
from mmkit.eval.batches import Batches
from mmkit.eval.examples import Picture
from mmkit.eval.parts import read_parts
from mmkit.eval.report import build_report
from mmkit.eval.tasks import load_task


def evaluate(kind: str, run: Path, *more: str) -> int:
    """Evaluate the tiny captioner or MLLM with the demo's recipe."""
    model = {"captioner": "clipcap", "mllm": "finetune"}[kind]
    return pipeline.mmkit("eval", f"demo-eval-{kind}", f"run={run}", f"model={pipeline.trained(model)}", *more)


@pytest.fixture(autouse=True)
def no_answers_of_other_tests(tmp_path, monkeypatch) -> None:
    """Answers are made, not taken over from the test before."""
    monkeypatch.setenv("MMKIT_CACHE", str(tmp_path / "cache"))


def scores(run: Path) -> dict:
    return json.loads((run / "scores.json").read_text())["tasks"]


@pytest.fixture(scope="module")
def mllm_run() -> Path:
    run = pipeline.root() / "eval" / "mllm"
    assert evaluate("mllm", run) == 0
    return run


@pytest.fixture(scope="module")
def captioner_run() -> Path:
    run = pipeline.root() / "eval" / "captioner"
    assert evaluate("captioner", run) == 0
    return run


def test_official_files_score_the_same_elsewhere(mllm_run, captioner_run):
    world = pipeline.root() / "world"
    files = {
        "vqav2": (mllm_run, "vqa_heldout_annotations.json", world / "vqa_heldout_questions.json"),
        "textvqa": (mllm_run, "textvqa_heldout.json", None),
        "coco-caption": (captioner_run, "captions_heldout.json", None),
    }
    for task, (run, truth, questions) in files.items():
        again = mmkit.score(task, run / "results" / f"{task}.json", world / truth, questions)
        assert again["metrics"] == scores(run)[task]["metrics"] and again["n"] == scores(run)[task]["n"]
        assert again["per_sample"] == scores(run)[task]["per_sample"]


def test_what_a_finished_run_holds(mllm_run, captioner_run):
    manifest = pipeline.manifest(mllm_run)
    assert (manifest["status"], manifest["kind"], manifest["skipped"]) == ("done", "eval", 0)
    assert manifest["parents"][0]["role"] == "model" and manifest["data"]["fingerprint"]
    rows = pipeline.rows(mllm_run / "predictions.jsonl")
    assert {r["task"] for r in rows} == {"vqav2", "textvqa"}
    assert all(r["image"] == r["image_shown"] and r["prompt"].startswith(r["question"]) for r in rows)
    # Answer types are for the report's filter; one picture needs no list of them.
    assert {r["type"] for r in rows if r["task"] == "vqav2"} == {"yes/no", "number", "other"}
    assert all("images" not in r and "parsed" not in r for r in rows)
    ids = [
        q["question_id"] for q in json.loads((pipeline.root() / "world" / "vqa_heldout_questions.json").read_text())["questions"]
    ]
    assert [r["id"] for r in rows if r["task"] == "vqav2"] == ids, "in the order of the data set"
    assert not list(mllm_run.glob("*part*")), "what answers were kept in while they came is gone"
    per_sample = {r["id"]: r["accuracy"] for r in scores(mllm_run)["vqav2"]["per_sample"]}
    assert {r["id"]: r["score"]["accuracy"] for r in rows if r["task"] == "vqav2"} == per_sample
    settings = scores(mllm_run)["textvqa"]["settings"]
    assert settings["decoding"] == "greedy" and settings["ocr"] == "none" and settings["blind"] is False
    assert settings["answers_from_cache"] == 0 and settings["batch_size"] == 64 and settings["left_out"] == 0
    speed = scores(mllm_run)["vqav2"]["settings"]["speed"]
    assert speed["pictures_encoded"] == 8 and speed["processes"] == 1 and speed["answers_per_second"] > 0
    assert settings["model_fingerprint"] == pipeline.manifest(pipeline.trained("finetune"))["product"]
    assert {r["prompt"] for r in pipeline.rows(captioner_run / "predictions.jsonl")} == {""}


def test_a_finished_evaluation_returns_at_once(mllm_run, monkeypatch, capsys):
    before = (mllm_run / "scores.json").stat().st_mtime_ns
    monkeypatch.setattr("mmkit.eval.run.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert evaluate("mllm", mllm_run) == 0
    assert (mllm_run / "scores.json").stat().st_mtime_ns == before
    assert "vqav2" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["mllm", "captioner"])
def test_predictions_do_not_depend_on_the_batch(kind, tmp_path, mllm_run, captioner_run):
    # Questions of different length are padded on the left; one by one there is no padding at all.
    sizes = ["tasks.0.generation.batch_size=1"] + ["tasks.1.generation.batch_size=1"] * (kind == "mllm")
    assert evaluate(kind, tmp_path / "single", *sizes) == 0
    whole = {"mllm": mllm_run, "captioner": captioner_run}[kind]
    for task in scores(whole):
        files = [json.loads((run / "results" / f"{task}.json").read_text()) for run in (whole, tmp_path / "single")]
        assert files[0] == files[1] and len(files[0]) > 1


def test_blind_shows_other_pictures_and_says_so(tmp_path, mllm_run):
    assert evaluate("mllm", tmp_path / "blind", "blind=true", "system=blind") == 0
    rows = pipeline.rows(tmp_path / "blind" / "predictions.jsonl")
    assert rows and all(r["image"] != r["image_shown"] for r in rows)
    assert scores(tmp_path / "blind")["vqav2"]["settings"]["blind"] is True
    seen = pipeline.rows(mllm_run / "predictions.jsonl")
    assert [(r["id"], r["prompt"], r["references"]) for r in rows] == [(r["id"], r["prompt"], r["references"]) for r in seen]


def test_limit_and_reference_ocr(tmp_path):
    more = ["tasks.0.limit=3", "tasks.1.limit=2", "tasks.1.ocr=reference"]
    assert evaluate("mllm", tmp_path / "run", *more) == 0
    found = scores(tmp_path / "run")
    assert found["vqav2"]["n"] == 3 and found["textvqa"]["n"] == 2 and found["textvqa"]["settings"]["ocr"] == "reference"
    rows = [r for r in pipeline.rows(tmp_path / "run" / "predictions.jsonl") if r["task"] == "textvqa"]
    assert all("\nReference OCR token: " in r["prompt"] for r in rows)


def test_answers_that_were_cut_are_counted(tmp_path):
    """Of a chain of thought without its end a rule reads what it finds; a score should say that there were some."""
    one = ["tasks.0.limit=12", "tasks.1.limit=2", "tasks.0.generation.max_new_tokens=1"]
    assert evaluate("mllm", tmp_path / "run", *one) == 0
    settings = scores(tmp_path / "run")["vqav2"]["settings"]
    assert settings["cut"] == 12 and "12 of 12 answers were cut at max_new_tokens=1, before their end" in settings["notes"]
    # From the cache as from the model.
    assert evaluate("mllm", tmp_path / "again", *one) == 0
    again = scores(tmp_path / "again")["vqav2"]["settings"]
    assert (again["answers_from_cache"], again["cut"], again["notes"]) == (12, 12, settings["notes"])
    rows = pipeline.rows(tmp_path / "again" / "predictions.jsonl")
    assert all(row["cut"] for row in rows if row["task"] == "vqav2")


def test_beams_are_named(tmp_path):
    assert evaluate("captioner", tmp_path / "run", "tasks.0.limit=2", "tasks.0.generation.num_beams=3") == 0
    assert scores(tmp_path / "run")["coco-caption"]["settings"]["decoding"] == "beam 3"


@pytest.mark.parametrize(
    ("generation", "told"),
    [
        ("{decoding: paper, max_new_tokens: 9}", "ClipCap's beam 5 (averaged over length, up to a full stop)"),
        ("{decoding: sample, top_p: 0.9, seed: 3, max_new_tokens: 9, batch_size: 3}", "sample, temperature 1, top_p 0.9, seed 3"),
    ],
)
def test_a_score_names_its_decoding(tmp_path, generation, told):
    assert evaluate("captioner", tmp_path / "run", f"tasks.0.generation={generation}") == 0
    assert scores(tmp_path / "run")["coco-caption"]["settings"]["decoding"] == told
    # In batches of another size, and without the model's own settings: the same captions.
    opened = mmkit.load(pipeline.trained("clipcap"))
    rows = pipeline.rows(tmp_path / "run" / "predictions.jsonl")
    pictures = [Image.open(row["image"]).convert("RGB") for row in rows]
    given = yaml.safe_load(generation)
    given.pop("batch_size", None)
    assert opened.predict(pictures, **given) == [row["prediction"] for row in rows]


def test_a_captioner_answers_no_questions(tmp_path, capsys):
    model = pipeline.trained("clipcap")
    assert pipeline.mmkit("eval", "demo-eval-mllm", f"run={tmp_path / 'run'}", f"model={model}") == 2
    assert "a model of kind captioner cannot do vqav2" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "scores.json").exists()


def test_the_same_task_twice_with_one_ocr_mode_is_refused(tmp_path, capsys):
    world = pipeline.root() / "world"
    task = {"task": "textvqa", "annotations": str(world / "textvqa_heldout.json"), "image_root": str(world)}
    assert evaluate("mllm", tmp_path / "run", f"tasks={json.dumps([task, task])}") == 2
    assert "task textvqa is listed twice with the same OCR mode" in capsys.readouterr().err


@pytest.fixture
def broken_pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    shutil.copytree(pipeline.root() / "world" / "images" / "heldout", folder)
    first, second, *_ = sorted(folder.glob("*.jpg"))
    first.write_bytes(first.read_bytes()[:200])
    second.unlink()
    return folder


def test_unreadable_pictures_score_as_wrong_and_are_listed(tmp_path, broken_pictures, capsys):
    run = tmp_path / "run"
    assert evaluate("captioner", run, f"tasks.0.image_root={broken_pictures}", "max_skipped=0.25") == 0
    found = scores(run)["coco-caption"]
    assert found["n"] == 8, "the denominator stays the official one"
    listed = {r["key"] for r in pipeline.rows(run / "skipped.jsonl")}
    bad = sorted(p.stem for p in pipeline.pictures())[:2]
    assert listed == {str(int(stem)) for stem in bad} and pipeline.manifest(run)["skipped"] == 2
    assert found["settings"]["left_out"] == 2
    assert "2 of 8 answers are empty since a picture could not be used (skipped.jsonl)" in found["settings"]["notes"]
    empty = [r for r in pipeline.rows(run / "predictions.jsonl") if str(r["id"]) in listed]
    assert [r["prediction"] for r in empty] == ["", ""] and all(r["score"]["CIDEr"] == 0 for r in empty)
    capsys.readouterr()
    assert evaluate("captioner", tmp_path / "strict", f"tasks.0.image_root={broken_pictures}") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "of 8 pictures cannot be used, over the limit of 1.00%" in error and "max_skipped" in error


def test_a_run_that_ended_over_its_pictures_goes_on_when_they_are_there(tmp_path, broken_pictures, captioner_run):
    """The disk was not mounted, say; the same command needs no --restart once it is."""
    run, words = tmp_path / "run", [f"tasks.0.image_root={broken_pictures}", "tasks.0.generation.batch_size=8"]
    assert evaluate("captioner", run, *words) == 2
    assert len(pipeline.rows(run / "skipped.jsonl")) == 2
    for path in pipeline.pictures():
        shutil.copy(path, broken_pictures / path.name)
    assert evaluate("captioner", run, *words) == 0
    texts = [[row["prediction"] for row in pipeline.rows(r / "predictions.jsonl")] for r in (run, captioner_run)]
    assert texts[0] == texts[1] and all(texts[0])
    assert not pipeline.rows(run / "skipped.jsonl") and pipeline.manifest(run)["skipped"] == 0


def test_a_refused_second_scoring_leaves_a_finished_run_as_it_was(tmp_path, broken_pictures, capsys):
    """Its list of lost pictures, too; and once it is taken, the lost ones are tried again and listed anew."""
    run, truth = tmp_path / "run", tmp_path / "truth.json"
    shutil.copy(pipeline.root() / "world" / "captions_heldout.json", truth)
    words = [f"tasks.0.image_root={broken_pictures}", f"tasks.0.annotations={truth}", "max_skipped=0.25"]
    assert evaluate("captioner", run, *words) == 0
    files = {name: (run / name).read_bytes() for name in ("skipped.jsonl", "scores.json", "predictions.jsonl", "manifest.json")}
    text = truth.read_text()
    truth.write_text(text + "\n")
    assert evaluate("captioner", run, *words, "tasks.0.settings.tokenizer=none") == 2
    assert "the data have changed since this run began" in capsys.readouterr().err
    assert {name: (run / name).read_bytes() for name in files} == files and files["skipped.jsonl"]
    truth.write_text(text)
    assert evaluate("captioner", run, *words, "tasks.0.settings.tokenizer=none") == 0
    assert scores(run)["coco-caption"]["settings"]["tokenizer"] == "none"
    assert (run / "skipped.jsonl").read_bytes() == files["skipped.jsonl"] and pipeline.manifest(run)["skipped"] == 2


@pytest.mark.parametrize("late", [True, False])
def test_answers_of_another_machine_may_come_late_but_have_to_come(tmp_path, monkeypatch, capsys, captioner_run, late):
    """Of a run directory on each machine's own disk the main process sees its own part alone."""
    run, read = tmp_path / "run", parts.read_parts
    seen: list[int] = []

    def read_late(path):
        found = read(path)
        if found["coco-caption"].texts:
            seen.append(1)
            if not late or len(seen) < 3:
                found["coco-caption"].texts.popitem()
        return found

    monkeypatch.setattr("mmkit.eval.run.read_parts", read_late)
    monkeypatch.setattr("mmkit.eval.run._LATE", 5.0 if late else 0.2)
    assert evaluate("captioner", run) == (0 if late else 2)
    if late:
        assert product(run) == product(captioner_run) and len(seen) >= 3
    else:
        assert "has written here cannot be seen; choose a run=DIR on a disk that all machines share" in capsys.readouterr().err


def test_long_pictures_are_not_read(tmp_path):
    run = tmp_path / "run"
    assert evaluate("captioner", run, "max_bytes=99", "max_skipped=1") == 0
    rows = pipeline.rows(run / "skipped.jsonl")
    assert len(rows) == 8 and all("bytes are over the limit of 99" in row["reason"] for row in rows)


def test_unreadable_pictures_are_counted_for_all_tasks_together(tmp_path, broken_pictures):
    # Two bad pictures with several questions each: every question is listed, and the limit is a share of the questions.
    roots = [f"tasks.{i}.image_root={broken_pictures}" for i in (0, 1)]
    assert evaluate("mllm", tmp_path / "run", *roots, "max_skipped=0.6") == 0
    rows = pipeline.rows(tmp_path / "run" / "predictions.jsonl")
    bad = {p.name for p in pipeline.pictures()[:2]}
    lost = [r for r in rows if Path(r["image"]).name in bad]
    assert lost and all(r["prediction"] == "" and r["score"]["accuracy"] == 0 for r in lost)
    assert pipeline.manifest(tmp_path / "run")["skipped"] == len({(r["image"], r["id"]) for r in lost})


def test_an_unfinished_model_is_refused(tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(pipeline.trained("finetune"), model)
    (model / "manifest.json").write_text(json.dumps({**pipeline.manifest(model), "status": "stopped"}))
    assert pipeline.mmkit("eval", "demo-eval-mllm", f"run={tmp_path / 'run'}", f"model={model}") == 2
    assert "this model run is not finished (status 'stopped')" in capsys.readouterr().err


def product(run: Path) -> tuple[bytes, dict]:
    """Predictions as they are, and scores without what says how they were made."""
    found = json.loads((run / "scores.json").read_text())
    for task in found["tasks"].values():
        for key in ("speed", "answers_from_cache", "batch_size", "cache"):
            task["settings"].pop(key)
    return (run / "predictions.jsonl").read_bytes(), found


def test_two_processes_give_the_product_of_one(tmp_path, mllm_run):
    model = pipeline.trained("finetune")
    words = ["eval", "demo-eval-mllm", f"run={tmp_path / 'run'}", f"model={model}", "tasks.0.generation.batch_size=4"]
    done = pipeline.torchrun(*words, MMKIT_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert product(tmp_path / "run") == product(mllm_run)
    speed = scores(tmp_path / "run")["vqav2"]["settings"]["speed"]
    # Every picture on one of the two only.
    assert speed["processes"] == 2 and speed["pictures_encoded"] == 8
    assert done.stdout.count("done: ") == 1 and "bug in mmkit" not in done.stderr
    again = pipeline.torchrun(*words)
    assert again.returncode == 0 and product(tmp_path / "run") == product(mllm_run)


def test_wrong_input_ends_both_processes_with_one_line(tmp_path):
    words = ["eval", "demo-eval-mllm", f"run={tmp_path / 'run'}", f"model={pipeline.trained('finetune')}"]
    done = pipeline.torchrun(*words, f"tasks.0.image_root={tmp_path}", f"tasks.1.image_root={tmp_path}")
    assert done.returncode != 0
    assert done.stderr.count("pictures cannot be used, over the limit of 1.00%") == 1 and "bug in mmkit" not in done.stderr


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int, number: signal.Signals) -> list[int]:
    """Send this process a signal once so many batches are done; the sizes of those that were answered."""
    answer, sizes = Batches.answer, []

    def told(self, batch, *, following):
        found = answer(self, batch, following=following)
        sizes.append(len(batch))
        if len(sizes) == batches:
            os.kill(os.getpid(), number)
        return found

    monkeypatch.setattr(Batches, "answer", told)
    return sizes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_after_the_batch_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys, mllm_run, number):
    run, size = tmp_path / "run", ["tasks.0.generation.batch_size=8", "tasks.1.generation.batch_size=8"]
    size += ["tasks.0.generation.reuse=false", "tasks.1.generation.reuse=false"]
    with monkeypatch.context() as patch:
        before = stop_after(patch, 2, number)
        assert evaluate("mllm", run, *size) == 75
    assert f"stopped by {number.name}; the same command goes on" in capsys.readouterr().err
    assert pipeline.manifest(run)["status"] == "stopped" and not (run / "scores.json").exists()
    # What a kill leaves of files and folders that were being written.
    cut = ("results/.vqav2.json.ab12cd", "submission/vqav2/.vqav2_submission.json.ab12cd", "submission/mme/.mme.ab12cd/x.txt")
    for left in cut:
        (run / left).parent.mkdir(parents=True, exist_ok=True)
        (run / left).touch()
    with monkeypatch.context() as patch:
        after = stop_after(patch, 10**6, number)
        assert evaluate("mllm", run, *size) == 0
    assert not [path for path in run.glob("*/**/*") if path.name.startswith(".")]
    questions = len(pipeline.rows(run / "predictions.jsonl"))
    assert len(before) == 2 and sum(before) + sum(after) == questions, "each question was asked once"
    assert product(run) == product(mllm_run)


def test_an_interrupted_run_with_another_recipe_is_refused(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 1, signal.SIGTERM)
        assert evaluate("mllm", run, "tasks.0.generation.batch_size=4") == 75
    changed = ["tasks.0.generation.batch_size=4", "tasks.0.generation.max_new_tokens=3"]
    assert evaluate("mllm", run, *changed) == 2
    assert "this run was made with another recipe" in capsys.readouterr().err
    assert evaluate("mllm", run, *changed, "--restart") == 0
    assert scores(run)["vqav2"]["settings"]["max_new_tokens"] == 3 and not list(run.glob("*part*"))


def test_another_rule_scores_the_answers_of_a_finished_run_again(tmp_path, monkeypatch, mllm_run):
    run = tmp_path / "run"
    shutil.copytree(mllm_run, run)
    before, rule = scores(run), ["tasks.0.settings.rule=always", "system=renamed"]
    rows = pipeline.rows(run / "predictions.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr("mmkit.eval.run.load_model", lambda *_: pytest.fail("the model was loaded"))
        # Killed when the new recipe is there and nothing else is: what the old one made must not pass for its scores.
        patch.setattr("mmkit.eval.run.read_parts", lambda *_: (_ for _ in ()).throw(MemoryError))
        assert evaluate("mllm", run, *rule) == 1
        assert pipeline.manifest(run)["status"] == "running"
        patch.setattr("mmkit.eval.run.read_parts", read_parts)
        assert evaluate("mllm", run, *rule) == 0
    after = scores(run)
    assert after["vqav2"]["settings"]["rule"] == "always" and before["vqav2"]["settings"]["rule"] == "official"
    # As the official file scored by that rule, without a model.
    world = pipeline.root() / "world"
    truth, questions = world / "vqa_heldout_annotations.json", world / "vqa_heldout_questions.json"
    again = mmkit.score("vqav2", mllm_run / "results" / "vqav2.json", truth, questions, rule="always")
    assert after["vqav2"]["metrics"] == again["metrics"]
    assert after["textvqa"] == before["textvqa"], "the other task is what it was, its speed too"
    assert after["vqav2"]["settings"]["speed"] == before["vqav2"]["settings"]["speed"] != {}
    assert [r["prediction"] for r in pipeline.rows(run / "predictions.jsonl")] == [r["prediction"] for r in rows]
    manifest = pipeline.manifest(run)
    assert (manifest["status"], manifest["system"], len(manifest["starts"])) == ("done", "renamed", 3)
    assert not list(run.glob("*part*"))


def test_a_finished_run_does_not_mind_how_it_was_done(mllm_run, monkeypatch):
    monkeypatch.setattr("mmkit.eval.run.Ranks", lambda *_: pytest.fail("it was begun again"))
    assert evaluate("mllm", mllm_run, "tasks.0.generation.batch_size=3", "tasks.1.generation.reuse=false") == 0


def test_a_second_run_takes_the_answers_of_the_first_and_says_so(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "mmkit")
    assert evaluate("mllm", tmp_path / "one") == 0
    with monkeypatch.context() as patch:
        patch.setattr("mmkit.eval.run.load_model", lambda *_: pytest.fail("the model was loaded"))
        assert evaluate("mllm", tmp_path / "two") == 0
    assert product(tmp_path / "one") == product(tmp_path / "two")
    count = scores(tmp_path / "two")["vqav2"]["n"]
    assert scores(tmp_path / "two")["vqav2"]["settings"]["answers_from_cache"] == count
    assert scores(tmp_path / "two")["vqav2"]["settings"]["speed"] == {}
    assert f"vqav2: {count} of {count} answers taken from earlier runs" in caplog.text
    # With other pictures some are asked what they were asked before, the others are not.
    fresh = ["tasks.0.generation.reuse=false", "tasks.1.generation.reuse=false"]
    assert evaluate("mllm", tmp_path / "blind", "blind=true") == 0
    assert evaluate("mllm", tmp_path / "blind-anew", "blind=true", *fresh) == 0
    assert scores(tmp_path / "blind")["vqav2"]["settings"]["answers_from_cache"] < count
    assert product(tmp_path / "blind")[0] == product(tmp_path / "blind-anew")[0]


def test_a_static_cache_and_an_automatic_size_change_nothing(tmp_path, mllm_run):
    generation = "{max_new_tokens: 8, batch_size: auto, cache: static, reuse: false}"
    assert evaluate("mllm", tmp_path / "run", *(f"tasks.{i}.generation={generation}" for i in (0, 1))) == 0
    assert product(tmp_path / "run") == product(mllm_run)
    settings = scores(tmp_path / "run")["vqav2"]["settings"]
    assert settings["cache"] == "static" and settings["batch_size"] == "auto" and settings["speed"]["batch_size_used"] == 64


def test_a_captioner_has_no_static_cache(tmp_path, capsys):
    assert evaluate("captioner", tmp_path / "run", "tasks.0.generation.cache=static") == 2
    assert "generation.cache=static is for MLLMs" in capsys.readouterr().err


def test_pictures_of_a_table_are_written_beside_the_predictions(tmp_path, monkeypatch, mllm_run):
    def from_table(config):
        examples = load_task(config)
        return [dataclasses.replace(e, images=tuple(Picture(Path(p.name).stem, p.read()) for p in e.images)) for e in examples]

    monkeypatch.setattr("mmkit.eval.run.load_task", from_table)
    assert evaluate("mllm", tmp_path / "run") == 0
    rows, files = pipeline.rows(tmp_path / "run" / "predictions.jsonl"), set((tmp_path / "run" / "pictures").iterdir())
    assert {Path(row["image"]) for row in rows} == files and len(files) == 8
    before = pipeline.rows(mllm_run / "predictions.jsonl")
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in before]
    assert all(Path(row["image"]).read_bytes() == Path(old["image"]).read_bytes() for row, old in zip(rows, before, strict=True))
    build_report([tmp_path / "run"], tmp_path / "report")
    assert "data:image" in (tmp_path / "report" / "report.html").read_text()


def test_names_and_published_scores_of_a_task(tmp_path):
    published = "[{system: Human, metrics: {accuracy: 0.84}, source: the paper, conditions: test-dev}]"
    more = ["tasks.0.name=my-vqa", f"tasks.0.published={published}", "tasks.0.limit=3", "tasks.1.limit=2"]
    assert evaluate("mllm", tmp_path / "run", *more) == 0
    found = scores(tmp_path / "run")
    assert list(found) == ["my-vqa", "textvqa"] and "published" not in found["textvqa"]
    assert found["my-vqa"]["published"] == [
        {"system": "Human", "metrics": {"accuracy": 0.84}, "source": "the paper", "conditions": "test-dev"}
    ]
    assert (tmp_path / "run" / "results" / "my-vqa.json").is_file()
    assert {r["task"] for r in pipeline.rows(tmp_path / "run" / "predictions.jsonl")} == {"my-vqa", "textvqa"}


def test_a_test_set_gets_the_servers_file_and_no_score(tmp_path, mllm_run, capsys):
    run, questions = tmp_path / "run", pipeline.root() / "world" / "vqa_heldout_questions.json"
    # The server's whole set has one question more than was asked.
    every = json.loads(questions.read_text())
    every["questions"].append({**every["questions"][0], "question_id": 10**9})
    (tmp_path / "all.json").write_text(json.dumps(every))
    published = [{"system": "Paper", "metrics": {"accuracy": 0.7}, "source": "table 1"}]
    task = {
        "name": "test-dev",
        "annotations": None,
        "settings": {"all_questions": str(tmp_path / "all.json")},
        "published": published,
    }
    more = [f"tasks.0.{key}={json.dumps(value)}" for key, value in task.items()]
    assert evaluate("mllm", run, *more) == 0
    found = scores(run)["test-dev"]
    asked = scores(mllm_run)["vqav2"]["n"]
    assert (found["task"], found["metrics"], found["per_sample"], found["n"]) == ("vqav2", {}, [], asked)
    assert found["answers"]["total"] == asked and found["published"][0]["metrics"] == {"accuracy": 0.7}
    assert "has no score here" in found["settings"]["notes"][0]
    # The same answers as with annotations, and nothing to compare them with.
    rows = {r["id"]: r for r in pipeline.rows(run / "predictions.jsonl") if r["task"] == "test-dev"}
    before = {r["id"]: r["prediction"] for r in pipeline.rows(mllm_run / "predictions.jsonl") if r["task"] == "vqav2"}
    assert {i: r["prediction"] for i, r in rows.items()} == before
    assert {(tuple(r["references"]), tuple(r["score"])) for r in rows.values()} == {((), ())}
    file = run / found["submission"]
    assert {row["question_id"] for row in json.loads(file.read_text())} == {*before, 10**9}
    # What the command says, also of a run that was done before, and a report of it.
    for _ in range(2):
        assert f"test-dev         no score, the answers are the server's: {file}" in capsys.readouterr().out
        assert evaluate("mllm", run, *more) == 0
    assert json.loads((run / "results" / "test-dev.json").read_text()) == json.loads(
        (mllm_run / "results" / "vqav2.json").read_text()
    )
    assert pipeline.mmkit("report", run, "--out", tmp_path / "report") == 0
    assert "has no score here" in (tmp_path / "report" / "report.md").read_text()


def test_a_part_of_an_annotated_set_is_no_submission(tmp_path, mllm_run):
    # Of whole sets there is one, since a server may read answers otherwise than the rule here.
    assert scores(mllm_run)["vqav2"]["submission"] == "submission/vqav2/vqav2_submission.json"
    assert evaluate("mllm", tmp_path / "run", "tasks.0.limit=3", "tasks.1.limit=2") == 0
    assert not (tmp_path / "run" / "submission").exists()
    assert all("submission" not in found for found in scores(tmp_path / "run").values())


def test_a_captioner_has_no_submission(tmp_path, captioner_run, capsys):
    assert "submission" not in scores(captioner_run)["coco-caption"]
    assert not (captioner_run / "submission").exists()
    # So nobody could score the answers.
    assert evaluate("captioner", tmp_path / "captions", "tasks.0.annotations=null") == 2
    assert "coco-caption without annotations has no score" in capsys.readouterr().err
