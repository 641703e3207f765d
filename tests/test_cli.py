"""The command line: its frozen surface, exit codes, and one clear line for every wrong input."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer

import mmkit
import mmkit.cli
import mmkit.commands
from mmkit.errors import LostError, StoppedError
from mmkit.eval.names import BUILT_IN
from mmkit.recipes import list_recipes, list_tasks

# Every command, its arguments and its options. A change here is a change for users: CHANGELOG, README, deprecation.
# fmt: off
SURFACE = {
    "": ["--version"],
    "demo": ["--out", "--clip", "--restart"],
    "train": ["RECIPE", "[KEY=VALUE]...", "--restart"],
    "probe": ["RECIPE", "[KEY=VALUE]...", "--restart"],
    "eval": ["RECIPE", "[KEY=VALUE]...", "--restart"],
    "score": ["TASK", "--predictions", "--annotations", "--questions", "--out", "[KEY=VALUE]..."],
    "report": ["RUN...", "--out", "--title", "--gallery", "--thumbnail"],
    "predict": [
        "MODEL", "IMAGE...", "--prompt", "--max-new-tokens", "--decoding", "--num-beams", "--length-penalty", "--temperature",
        "--top-p", "--top-k", "--seed",
    ],
    "ls": [],
    "copy": ["NAME", "DEST"],
    "plan": [
        "RECIPE",
        "--gpus",
        "--gpu",
        "--gpu-memory",
        "--tflops",
        "--mfu",
        "--samples",
        "--tokens",
        "--longest",
        "--encoder",
        "--json",
        "--markdown",
        "[KEY=VALUE]...",
    ],
    "validate": ["RECIPE", "[KEY=VALUE]...", "--show"],
    "data": [],
    "data inspect": [
        "DATA", "--type", "--image-root", "--image", "--caption", "--streaming", "--labels", "--context-length", "--stop-words",
        "--idf", "--words", "--words-size", "--min-count", "--limit", "--no-pictures", "--workers", "--out", "--sample",
    ],
    "data pack": [
        "DATA", "--out", "--shard-size", "--max-side", "--quality", "--limit", "--type", "--image-root", "--image", "--caption",
        "--streaming", "--workers",
    ],
    "export": ["RUN", "OUT", "--format", "--checkpoint"],
    "bench": ["NAME", "[KEY=VALUE]..."],
    "data synth": ["--out", "--train", "--heldout", "--image-size", "--seed"],
}
# fmt: on
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Call]:
    """Run the command line in this process: exit code, standard output, standard error."""
    monkeypatch.delenv("RANK", raising=False)
    level = logging.getLogger("mmkit").level

    def run(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            mmkit.cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, captured.out, captured.err

    yield run
    logging.captureWarnings(False)
    logging.getLogger("mmkit").setLevel(level)


def refused(call: Call, *words: object) -> str:
    """The one line of a refusal."""
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    assert err.startswith("mmkit: ")
    assert "Traceback" not in err
    return err


def surface(command: Any, name: str = "") -> Iterator[tuple[str, list[str]]]:
    yield name, [p.metavar if p.param_type_name == "argument" else p.opts[0] for p in command.params]
    assert all(len(p.opts) == 1 for p in command.params if p.param_type_name == "option"), "short forms are surface, too"
    for word, inner in getattr(command, "commands", {}).items():
        yield from surface(inner, f"{name} {word}".strip())


def test_the_surface_is_frozen() -> None:
    assert dict(surface(typer.main.get_command(mmkit.cli.app))) == SURFACE


@pytest.mark.parametrize("command", SURFACE)
def test_every_command_explains_itself(call: Call, command: str) -> None:
    code, out, err = call(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert "Usage:" in out
    for word in SURFACE[command]:
        assert word.strip("[].") in out
    assert len(out.splitlines()) > 5


def test_version(call: Call) -> None:
    assert call("--version") == (0, f"mmkit {mmkit.__version__}\n", "")


def test_no_command_shows_the_help(call: Call) -> None:
    for words in ((), ("data",)):
        code, _, err = call(*words)
        assert code == 2
        assert "Commands:" in err
        assert len(err.splitlines()) > 5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tarin"], "No such command 'tarin'. Did you mean 'train'?"),
        (["train"], "Missing argument 'RECIPE'"),
        (["train", "--fast", "x"], "No such option: --fast"),
        (["score", "vqav2"], "Missing option '--predictions'"),
        (["data", "synth", "--out", "x", "--train", "3"], "'--train'"),
        (["train", "demo-superclas"], "did you mean 'demo-superclass'?"),
        (["train", "demo-superclass", "train.lrr=1"], "unknown key 'train.lrr'; did you mean train.lr?"),
        (["train", "demo-superclass", "nonsense"], "override 'nonsense' is not of the form key=value"),
        (["train", "demo-probe"], "use `mmkit probe`"),
        (["eval", "demo-probe"], "stage probe"),
        (["probe", "demo-superclass"], "stage superclass"),
        (["predict", "runs/none", "no_such.jpg"], "no_such.jpg: cannot be read"),
        (["copy", "demo-superclas", "x.yaml"], "did you mean 'demo-superclass'?"),
        (["validate", "none.yaml"], "no recipe 'none.yaml'"),
    ],
)
def test_wrong_words_are_one_line(
    call: Call, words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in refused(call, *words)
    assert list(tmp_path.iterdir()) == []


def test_the_argument_that_deepspeed_adds_is_no_option(call: Call) -> None:
    assert call("--local_rank=1", "ls") == call("ls")


def test_ls_and_copy(call: Call, tmp_path: Path) -> None:
    code, out, _ = call("ls")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [*list_recipes(), *list_tasks()]
    target = tmp_path / "mine.yaml"
    assert call("copy", "demo-superclass", target) == (0, f"written: {target}\n", "")
    assert target.read_text() == list_recipes()["demo-superclass"].read_text()
    assert f"{target}: file exists" in refused(call, "copy", "demo-superclass", target)
    code, out, _ = call("validate", target)
    assert (code, out) == (0, f"valid: {target} (stage superclass)\n")


def test_validate_shows_the_resolved_recipe(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMKIT_DEMO", "somewhere")
    code, out, _ = call("validate", "demo-clipcap", "train.lr=2e-3", "--show")
    assert code == 0
    assert "run: somewhere/superclass/clipcap\n" in out
    assert "  lr: 0.002\n" in out
    assert out.endswith("valid: demo-clipcap (stage clipcap)\n")


def test_validate_looks_into_the_parts(call: Call) -> None:
    assert "vit_tiny_patch16_225" in refused(call, "validate", "demo-superclass", "encoder.architecture=vit_tiny_patch16_225")
    assert "DeepSpeed" in refused(call, "validate", "demo-superclass", "train.deepspeed=zero9")
    assert "tasks.0.prompt" in refused(call, "validate", "demo-eval-mllm", "tasks.0.prompt=what")


def test_score_writes_the_designs_layout(call: Call, shared: Path, tmp_path: Path) -> None:
    files = [shared / "scoring" / f"vqa_cases_a_{kind}.json" for kind in ("results", "annotations", "questions")]
    words = ["score", "vqav2", "--predictions", files[0], "--annotations", files[1], "--questions", files[2]]
    out = tmp_path / "deep" / "scores.json"
    code, said, err = call(*words, "--out", out, "bootstrap=50", "seed=3")
    assert (code, err) == (0, "")
    assert "accuracy         0.916667  [" in said
    assert "n 30" in said
    assert f"written: {out}" in said
    found = json.loads(out.read_text())
    assert list(found) == ["task", "metrics", "ci95", "n", "settings", "per_sample", "answers", "breakdown"]
    assert sum(row["n"] for row in found["breakdown"]["question_type"].values()) == 30
    assert (found["task"], found["n"], len(found["per_sample"])) == ("vqav2", 30, 30)
    assert found["metrics"]["accuracy"] == pytest.approx(0.916667, abs=1e-6)
    assert set(found["metrics"]) >= {"accuracy", "accuracy_yes/no", "accuracy_number", "accuracy_other"}
    assert (found["settings"]["bootstrap"], found["settings"]["seed"], found["settings"]["rule"]) == (50, 3, "official")
    low, high = found["ci95"]["accuracy"]
    assert low <= found["metrics"]["accuracy"] <= high
    assert all(set(row) == {"id", "accuracy"} for row in found["per_sample"])
    again = mmkit.score("vqav2", files[0], files[1], files[2], bootstrap=50, seed=3)
    assert json.loads(json.dumps(again)) == found


def test_score_settings_change_the_number_and_intervals_can_be_left_out(call: Call, shared: Path) -> None:
    files = [shared / "scoring" / f"vqa_cases_a_{kind}.json" for kind in ("results", "annotations")]
    code, said, _ = call("score", "vqav2", "--predictions", files[0], "--annotations", files[1], "rule=2017", "bootstrap=0")
    assert code == 0
    assert "accuracy         0.783333\n" in said
    assert "[" not in said


def test_score_help_lists_the_suites(call: Call) -> None:
    code, said, _ = call("score", "--help")
    assert code == 0
    assert [name for name in BUILT_IN if name not in said] == []


def test_score_of_own_questions_and_its_warning(call: Call, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "q.jsonl").write_text(
        '{"id": "a", "question": "?", "answers": ["red"]}\n{"id": "b", "question": "?", "answers": ["7"]}\n'
    )
    (tmp_path / "p.jsonl").write_text('{"id": "a", "prediction": "it is a very bright red"}\n{"id": "b", "prediction": "7"}\n')
    words = ["score", "generic", "--predictions", tmp_path / "p.jsonl", "--annotations", tmp_path / "q.jsonl", "bootstrap=0"]
    code, said, _ = call(*words, "metric=normalised")
    assert code == 0 and "accuracy         0.500000\n" in said and "metric=normalised" in said
    assert "WARNING: 1 of 2 answers have more than 5 words" in caplog.text
    code, said, err = call(*words, "metric=contains")
    assert (code, err) == (0, "") and "accuracy         1.000000\n" in said
    assert "unknown metric 'contain'; did you mean contains?" in refused(call, *map(str, words), "metric=contain")


def test_score_records_the_ocr_mode(call: Call, tmp_path: Path) -> None:
    row = {"question_id": 1, "image_id": "a", "question": "?", "answers": ["stop"] * 10}
    (tmp_path / "a.json").write_text(json.dumps({"data": [row]}))
    (tmp_path / "p.json").write_text('[{"question_id": 1, "answer": "Stop"}]')
    words = ["score", "textvqa", "--predictions", tmp_path / "p.json", "--annotations", tmp_path / "a.json", "ocr=reference"]
    code, said, _ = call(*words, "anls=true")
    assert code == 0 and "ocr=reference" in said and "anls" in said


def test_score_captions(call: Call, shared: Path) -> None:
    broken = shared / "broken"
    words = ["--predictions", broken / "results_good.json", "--annotations", broken / "captions_good.json"]
    code, said, _ = call("score", "coco-caption", *words, "bootstrap=20")
    assert code == 0
    assert [line.split()[0] for line in said.splitlines()] == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr", "n"]
    assert "n 6  tokenizer=python" in said


@pytest.mark.parametrize(
    ("predictions", "annotations", "expected"),
    [
        ("results_good.json", "captions_cut.json", "looks cut off"),
        ("results_good.json", "captions_unknown_image_ids.json", "999, 1000"),
        ("results_good.json", "captions_wrong_fields.json", "annotation 107"),
        ("results_unknown_image_ids.json", "captions_good.json", "unknown images: 999"),
        ("results_duplicate.json", "captions_good.json", "more than one row for image 3"),
        ("results_missing.json", "captions_good.json", "2 of 6 images have no result: 5, 6"),
        ("results_string_ids.json", "captions_good.json", "is a string in 6 of 6 rows"),
        ("results_none.json", "captions_good.json", "No such file"),
        ("results_good.json", "captions_none.json", "No such file"),
        ("results_good.json", "zero_bytes.jpg", "the file is empty"),
        ("good.jpg", "captions_good.json", "not UTF-8"),
        ("captions_good.json", "results_good.json", "this is no COCO caption annotation file"),
    ],
)
def test_bad_score_files_are_one_line(call: Call, shared: Path, predictions: str, annotations: str, expected: str) -> None:
    broken = shared / "broken"
    message = refused(call, "score", "coco-caption", "--predictions", broken / predictions, "--annotations", broken / annotations)
    assert expected in message
    assert str(broken) in message


def test_bad_vqa_results_name_both_faults(call: Call, shared: Path) -> None:
    broken = shared / "broken"
    words = ["--predictions", broken / "vqa_results_missing_and_extra.json", "--annotations", broken / "vqa_annotations.json"]
    message = refused(call, "score", "vqav2", *words, "--questions", broken / "vqa_questions.json")
    assert "99999" in message
    assert "1002" in message


@pytest.mark.parametrize(
    ("task", "setting", "expected"),
    [
        ("coco-captions", "seed=1", "did you mean coco-caption?"),
        ("coco-caption", "tokeniser=none", "did you mean tokenizer?"),
        ("coco-caption", "tokenizer=perl", "unknown tokenizer 'perl'"),
        ("coco-caption", "bootstrap=many", "bootstrap is a whole number"),
        ("coco-caption", "rule=2017", "rule does not apply"),
        ("coco-caption", "none", "setting 'none' is not of the form key=value"),
    ],
)
def test_bad_score_settings(call: Call, shared: Path, task: str, setting: str, expected: str) -> None:
    broken = shared / "broken"
    words = ["--predictions", broken / "results_good.json", "--annotations", broken / "captions_good.json"]
    assert expected in refused(call, "score", task, *words, setting)


def test_out_that_cannot_be_written_is_no_bug(call: Call, shared: Path, tmp_path: Path) -> None:
    broken = shared / "broken"
    words = ["--predictions", broken / "results_good.json", "--annotations", broken / "captions_good.json", "bootstrap=0"]
    (tmp_path / "file").touch()
    for place, what in (
        (tmp_path, "is a folder; name a file, such as"),
        (tmp_path / "file" / "x.json", "is a file, not a folder"),
    ):
        code, said, err = call("score", "coco-caption", *words, "--out", place)
        assert code == 2 and not said, "before anything is scored"
        assert err.count("\n") == 1
        assert str(place if place == tmp_path else tmp_path / "file") in err and what in err


def test_tasks_and_suites_are_told_apart(call: Call) -> None:
    err = refused(call, "score", "textvqa-val-ocr", "--predictions", "a.json", "--annotations", "b.json")
    assert "'textvqa-val-ocr' is a task of `mmkit eval`; a result file is scored by its suite; use textvqa" in err
    err = refused(call, "eval", "pope")
    assert "no such" in err or "model" in err, "the one name that is both is the task's"
    err = refused(call, "eval", "gqa", "model=x")
    assert "'gqa' is a suite" in err and "tasks of it: gqa-testdev-balanced" in err
    assert "docs/evaluation.md" in refused(call, "eval", "generic", "model=x")


def test_a_missing_word_leads_to_the_help_of_its_command(call: Call) -> None:
    assert "report --help" in refused(call, "report", "--out", "x")


def test_broken_picture_and_its_reason(call: Call, shared: Path) -> None:
    picture = shared / "broken" / "truncated.jpg"
    assert f"{picture}: cannot be decoded" in refused(call, "predict", "runs/none", shared / "broken" / "good.jpg", picture)


def test_synth_says_what_it_made(call: Call, tmp_path: Path) -> None:
    words = ["data", "synth", "--out", tmp_path / "w", "--train", 8, "--heldout", 4, "--image-size", 32]
    code, first, _ = call(*words)
    assert code == 0
    assert "train_pictures 8" in first
    assert call(*words)[:2] == (0, first)
    assert "choose another --out" in refused(call, *words, "--seed", 1)


MEND_FULL = "free some space, then run the same command again"


def raiser(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*arguments: object, **options: object) -> NoReturn:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (LostError("process 1 of 2 was lost"), 1, "mmkit: process 1 of 2 was lost"),
        (OSError(28, "", "events.1"), 2, "mmkit: events.1: cannot be written (No space left on device); " + MEND_FULL),
        (RuntimeError("boom"), 1, "mmkit: this is a bug in mmkit; please report it with the lines above"),
        (KeyError("x"), 1, "mmkit: this is a bug in mmkit; please report it with the lines above"),
        (StoppedError("stopped at step 5"), 75, "mmkit: stopped at step 5"),
        (KeyboardInterrupt(), 130, "mmkit: interrupted"),
    ],
)
def test_exit_codes(call: Call, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, last: str) -> None:
    monkeypatch.setattr(mmkit.commands, "run_train", raiser(error))
    found, out, err = call("train", "demo-superclass")
    assert (found, out) == (code, "")
    assert err.splitlines()[-1] == last
    assert ("Traceback" in err) == ("bug" in last)


def test_only_the_main_process_complains(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert call("train", "no-such-recipe") == (2, "", "")
    # But for the loss of a process, which may be the main one.
    monkeypatch.setattr(mmkit.commands, "run_train", raiser(LostError("process 0 of 2 was lost")))
    assert call("train", "demo-superclass") == (1, "", "mmkit: process 0 of 2 was lost\n")


def python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(mmkit.__file__).parent.parent)}
    return subprocess.run([sys.executable, *code.split(), *words], capture_output=True, text=True, check=False, env=env)


def test_as_a_process(shared: Path) -> None:
    broken = shared / "broken"
    words = ["--predictions", f"{broken}/results_unknown_image_ids.json", "--annotations", f"{broken}/captions_good.json"]
    done = python("-m mmkit score coco-caption", *words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "results for 1 unknown images: 999" in done.stderr


def test_a_reader_that_has_enough_is_no_error() -> None:
    code = "import sys; from mmkit.cli import main; sys.stdin.readline(); main(['ls'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(mmkit.__file__).parent.parent)},
    )  # fmt: skip
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stdin.write(b"go\n")
    process.stdin.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)
    process.stderr.close()


def test_importing_and_listing_is_light() -> None:
    code = "import sys, mmkit, mmkit.cli; print([m for m in ('torch', 'transformers', 'timm', 'deepspeed') if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


def test_export_and_bench_are_wired(call: Call, tmp_path: Path) -> None:
    import pipeline

    out, encoder = tmp_path / "exported", pipeline.trained("superclass")
    code, said, _ = call("export", encoder, out, "--format", "siglip")
    # The last line: other libraries print when they are first imported, and the shared encoder may just have been trained.
    assert code == 0 and said.endswith(f"\ndone: {out}\n" if said.count("\n") > 1 else f"done: {out}\n")
    assert (out / "config.json").is_file()
    assert "open_clip wants a text tower" in refused(call, "export", encoder, tmp_path / "x", "--format", "open_clip")
    code, said, _ = call("bench", "superclass-loss", "batch=4", "width=4", "vocab_size=9", "labels=2", "repeats=1", "threads=1")
    assert code == 0 and "memory, mmkit / published" in said and "B=4 D=4 V=9" in said
    assert "is not of the form key=value" in refused(call, "bench", "labels", "threads")
    assert "known: superclass-loss" in refused(call, "bench", "speed")


@pytest.fixture
def few(shared: Path, tmp_path: Path) -> Path:
    """Two pairs under unusual keys, the second with a bad picture."""
    rows = [{"picture": name, "text": "a red bus"} for name in ("good.jpg", "zero_bytes.jpg")]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "few.jsonl"


def test_inspect_options_reach_their_place(call: Call, shared: Path, few: Path, tmp_path: Path) -> None:
    words = ["data", "inspect", few, "--image-root", shared / "broken", "--image", "picture", "--caption", "text"]
    code, said, _ = call(*words, "--workers", 2, "--sample", 0, "--out", tmp_path / "out", "--type", "pairs")
    assert code == 0
    assert "pairs: 1\nleft out: 1\n  1 x the file is empty\n" in said and "pictures: 1\n" in said
    assert said.endswith(f"wrote {tmp_path / 'out/inspect.html'}\n")
    assert "<img" not in (tmp_path / "out/inspect.html").read_text()
    code, said, _ = call(*words, "--no-pictures")
    assert code == 0 and "pairs: 2\nleft out: 0\n" in said and "pictures: " not in said
    assert "no usable sample (2 left out" in refused(call, "data", "inspect", few)


def test_pack_options_reach_their_place(call: Call, shared: Path, few: Path, tmp_path: Path) -> None:
    keys = ["--image-root", shared / "broken", "--image", "picture", "--caption", "text"]
    words = ["data", "pack", few, *keys, "--out", tmp_path / "out"]
    options = ["--type", "pairs", "--max-side", 50, "--quality", 80, "--shard-size", 1, "--workers", 2]
    said = f"samples: 1\nshards: 1\nleft out: 1\n  1 x the file is empty\ndone: {tmp_path / 'out'}\n"
    assert call(*words, *options)[:2] == (0, said)
    record = json.loads((tmp_path / "out/pack.json").read_text())
    assert record["settings"].items() >= {"max_side": 50, "quality": 80, "shard_size": 1, "pairs": 2, "caption": "text"}.items()
    assert "pairs 2, now 1" in refused(call, *words, *options, "--limit", 1)
    assert call("data", "pack", tmp_path / "out")[1] == f"samples: 1\nshards: 1\nleft out: 0\ndone: {tmp_path / 'out'}\n"
    assert "--limit has no effect" in refused(call, "data", "pack", tmp_path / "out", "--limit", 1)
    assert "leave the keys out" in refused(call, "data", "pack", tmp_path / "out", "--streaming")


def test_streaming_reads_the_files_behind_a_data_set(call: Call, shared: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pictures = [{"bytes": (shared / "broken" / name).read_bytes(), "path": None} for name in ("good.jpg", "truncated.jpg")]
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"image": pictures, "caption": ["a", "b"]}), tmp_path / "set/train.parquet")
    # Which way it was read shows in the keys.
    for words, key in (([], "row 1"), (["--streaming"], "group 0 row 1")):
        data = f"hf:{tmp_path / 'set'}@train"
        assert call("data", "inspect", data, "--workers", 1, "--out", tmp_path / f"i{len(words)}", *words)[0] == 0
        assert call("data", "pack", data, "--workers", 1, "--out", tmp_path / f"p{len(words)}", *words)[0] == 0
        for folder in ("i", "p"):
            assert json.loads((tmp_path / f"{folder}{len(words)}/skipped.jsonl").read_text())["key"] == key
