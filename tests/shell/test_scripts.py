"""The shell scripts: clean, and every mmkit command in them is one that mmkit takes.

The scripts run for real, with the launchers and mmkit replaced by a stub that writes down how it was called.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click import Command

from mmkit.cli import app
from mmkit.config import load_recipe
from mmkit.recipes import find_recipe, list_recipes, list_tasks
from mmkit.validate import check_parts

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT / name for name in ("encoders", "training", "eval")]
SCRIPTS = sorted(p for folder in FOLDERS for suffix in ("sh", "sbatch") for p in folder.rglob(f"*.{suffix}"))
READMES = [folder / "README.md" for folder in FOLDERS]
RANK = "training/launch/rank.sh"
WITH_RECIPE = ("train", "probe", "eval", "validate")
STUB = """#!/usr/bin/env bash
{ printf '%s\\n' "${0##*/}" "$@"; printf '\\0'; } >>"$CALLS"
exit "${STUB_EXIT:-0}"
"""


def _commands() -> dict[str, Command]:
    import typer.main

    group = typer.main.get_command(app)
    return dict(group.commands)  # type: ignore[attr-defined]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a script with stubs in front of PATH; gives its exit code and the calls, as lists of words."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name in ("mmkit", "torchrun", "deepspeed", "python", "scontrol", "srun", "sbatch"):
        (stubs / name).write_text(STUB, encoding="utf-8")
        (stubs / name).chmod(0o755)
    names = "NGPU DATA RUNS MMKIT_DEMO HOSTFILE NNODES PYTHON WORLD VALIDATE LOGS RESTARTS SHARED"
    names += " NAME ENCODER LLM STAGES SYSTEMS BLIND SYSTEM PRETRAIN ALIGN FINETUNE CLIPCAP LAUNCHER SCALE"
    for name in names.split():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    log = tmp_path / "calls"

    def run(script: str, *arguments: str, **environment: str) -> tuple[int, list[list[str]], str]:
        log.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", str(ROOT / script), *arguments],
            env={**os.environ, "PATH": f"{stubs}:{os.environ['PATH']}", "CALLS": str(log), **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        text = log.read_text(encoding="utf-8") if log.exists() else ""
        return done.returncode, [c.split("\n")[:-1] for c in text.split("\0") if c], done.stderr

    return run


def mmkit_words(call: list[str]) -> list[str]:
    """What reaches mmkit in a recorded call."""
    if call[0] == "mmkit":
        return call[1:]
    # A launcher starts rank.sh, which starts mmkit with the words behind it; Slurm takes them behind the batch file.
    after = {"python": "mmkit", "sbatch": str(ROOT / "training/launch/slurm.sbatch")}.get(call[0], str(ROOT / RANK))
    return call[call.index(after) + 1 :] if after in call else []


def check_calls(recorded: list[list[str]]) -> list[str]:
    """Every call is a command of mmkit, and its recipe takes its overrides; gives 'command recipe' of each."""
    seen = []
    for call in recorded:
        words = mmkit_words(call)
        if not words:
            continue
        assert words[0] in _commands(), call
        if words[0] in WITH_RECIPE:
            recipe = load_recipe(find_recipe(words[1]), words[2:])
            check_parts(recipe)
            verb = "train" if recipe.stage in ("superclass", "clip", "lit", "clipcap", "llava") else recipe.stage
            assert words[0] in (verb, "validate"), call
            seen.append(" ".join(words[:2]))
        else:
            seen.append(words[0])
    return seen


def code_in(path: Path) -> str:
    """What a user would run: code of a README, lines of a script, and quoted code in either's prose."""
    text = path.read_text(encoding="utf-8")
    quoted = re.findall(r"`([^`\n]+)`", text)
    if path.suffix == ".md":
        return "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S) + quoted)
    return "\n".join([line for line in text.splitlines() if not line.startswith("#")] + quoted)


def test_there_are_scripts() -> None:
    names = {str(p.relative_to(ROOT)) for p in SCRIPTS}
    assert names >= {
        "encoders/pretrain.sh",
        "encoders/rivals.sh",
        "training/run.sh",
        "training/pipeline.sh",
        "training/launch/common.sh",
        RANK,
        "training/launch/torchrun.sh",
        "training/launch/deepspeed_hostfile.sh",
        "training/launch/slurm.sbatch",
        "eval/run.sh",
        "eval/prepare.sh",
        "eval/pipeline_cpu.sh",
    }


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_script_is_clean(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text
    for word in ("usage", "hardware", "time"):
        assert re.search(rf"^#   {word}\b", text, re.M), f"no {word} in the head of {path.name}"
    assert max(map(len, text.splitlines())) <= 130
    assert os.access(path, os.X_OK) or path.suffix == ".sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck(path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS + READMES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_commands_and_recipes_in_the_text_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    commands, recipes = _commands(), list_recipes() | list_tasks()
    used = re.findall(r"(?<![\w/.-])mmkit ([a-z]+)(?: ([\w\"$.-]+))?", code_in(path))
    assert used or path.parent.name == "launch" or path.name in ("prepare.sh", "run.sh")
    for command, word in used:
        assert command in commands, f"mmkit {command}"
        if command in WITH_RECIPE and re.match(r"[a-z]", word):
            assert word in recipes, f"mmkit {command} {word}"
    for name in re.findall(r"\b(?:superclass-vit|llava-7b|clipcap|demo)-[a-z0-9-]*[a-z0-9]", text):
        assert {name, name.removesuffix("-probe")} & set(recipes), f"{path.name} names {name}"


@pytest.mark.parametrize("path", READMES, ids=lambda p: p.parent.name)
def test_readme_names_files_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert 25 <= len(text.splitlines()) <= 100  # stage 1 has three stages and five probes to tell of
    files = re.findall(r"`(mmkit/[\w/]+\.py)`", text) + re.findall(r"((?:encoders|training|eval)/[\w/]+\.(?:sh|sbatch))", text)
    assert files
    for name in files:
        assert (ROOT / name).is_file(), f"{path.parent.name}/README.md names {name}"
    assert "measured\nnone" in text or "measured none" in text


def test_pretrain_validates_first_and_launches_all_gpus(calls) -> None:
    code, found, stderr = calls("encoders/pretrain.sh", "superclass-vit-l16", "train.lr=1e-3", NGPU="4", RUNS="out")
    assert code == 0
    assert check_calls(found) == ["validate superclass-vit-l16", "train superclass-vit-l16"]
    assert found[1][:4] == ["torchrun", "--standalone", "--nproc_per_node", "4"]
    assert found[1][-2:] == ["train.lr=1e-3", "run=out/superclass-vit-l16"]
    assert "probe is left out" in stderr


def test_pretrain_probes_where_imagenet_is(calls, tmp_path: Path) -> None:
    (tmp_path / "data/imagenet/train").mkdir(parents=True)
    code, found, _ = calls("encoders/pretrain.sh", NGPU="1")
    assert code == 0
    assert check_calls(found)[-1] == "probe probe-imagenet"
    assert found[1][:3] == ["python", "-m", "mmkit"]
    assert "encoder=runs/superclass-vit-b16" in found[-1]


def test_rivals_see_equal_samples(calls) -> None:
    code, found, _ = calls("encoders/rivals.sh", "s16", "train.samples=128000000", NGPU="2", RUNS="out")
    assert code == 0
    assert check_calls(found) == [
        *["validate superclass-vit-s16"] * 2,
        "validate lit-vit-s16",
        *["train superclass-vit-s16"] * 2,
        "train lit-vit-s16",
        *["probe probe-imagenet"] * 2,
        *["probe zeroshot-imagenet"] * 2,
        "report",
    ]
    ours, theirs, lit = (load_recipe(find_recipe(c[0]), c[1:]) for c in (mmkit_words(call)[1:] for call in found[3:6]))
    assert (ours.stage, theirs.stage, lit.stage) == ("superclass", "clip", "lit")
    assert ours.model_dump(include={"data", "train", "seed"}) == theirs.model_dump(include={"data", "train", "seed"})
    assert lit.encoder.init == ours.run and lit.train.samples == ours.train.samples == 128_000_000


def test_training_runs_captioner_align_and_fine_tune(calls) -> None:
    code, found, _ = calls("training/run.sh", "runs/other", "data.workers=8", FINETUNE="llava-7b-lora")
    assert code == 0
    stages = ("clipcap-superclass", "llava-7b-align", "llava-7b-lora")
    seen = check_calls(found)
    # All of them before the first, and each once more when it starts.
    assert seen[:3] == [f"validate {stage}" for stage in stages]
    assert seen[3:] == [f"{verb} {stage}" for stage in stages for verb in ("validate", "train")]
    assert found[6][:4] == ["deepspeed", "--num_gpus", "8", "--no_python"]
    assert "encoder=runs/other" in found[6] and "run=runs/models-other/llava-align" in found[6]
    assert {"model=runs/models-other/llava-align", "run=runs/models-other/llava-7b-lora"} <= set(found[8])


def test_a_failing_stage_stops_the_script(calls) -> None:
    for script in ("encoders/pretrain.sh", "encoders/rivals.sh", "training/run.sh", "eval/run.sh", "eval/pipeline_cpu.sh"):
        code, found, _ = calls(script, STUB_EXIT="75")
        assert (code, len(found)) == (75, 1), script


def test_hostfile_must_exist(calls, tmp_path: Path) -> None:
    code, found, stderr = calls("training/launch/deepspeed_hostfile.sh", "train", "llava-7b-align", HOSTFILE="nowhere")
    assert (code, found) == (2, [])
    assert "nowhere" in stderr
    (tmp_path / "hosts").write_text("a slots=8\n", encoding="utf-8")
    code, found, _ = calls("training/launch/deepspeed_hostfile.sh", "train", "llava-7b-align", HOSTFILE="hosts", VALIDATE="0")
    assert code == 0 and found[0][:3] == ["deepspeed", "--hostfile", "hosts"]
    assert check_calls(found) == ["train llava-7b-align"]


def test_other_machines_get_the_variables_of_this_one(calls, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=8\n", encoding="utf-8")
    stub = tmp_path / "stubs" / "deepspeed"
    stub.write_text('#!/usr/bin/env bash\ncat "$DS_ENV_FILE" >environment\n', encoding="utf-8")
    more = {"HOSTFILE": "hosts", "DATA": "/data", "PASS": "HF_TOKEN", "HF_TOKEN": "x=y", "RUNS": "out"}
    code, _, _ = calls("training/launch/deepspeed_hostfile.sh", "train", "llava-7b-align", **more)
    assert code == 0
    found = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text(encoding="utf-8").splitlines())
    assert found["DATA"] == "/data" and found["HF_TOKEN"] == "x=y" and found["PYTHON"] == "python"
    # Where all machines can write it.
    assert found["MMKIT_CODES"].startswith(str(tmp_path / "out/.launch"))


def test_several_machines_by_torchrun(calls) -> None:
    environment = {"NNODES": "8", "NODE_RANK": "3", "MASTER_ADDR": "host0", "VALIDATE": "0"}
    code, found, _ = calls("training/launch/torchrun.sh", "train", "superclass-vit-l14", **environment)
    assert code == 0
    assert found[0][1:7] == ["--nnodes", "8", "--node_rank", "3", "--master_addr", "host0"]
    assert check_calls(found) == ["train superclass-vit-l14"]
    code, found, stderr = calls("training/launch/torchrun.sh", "train", "superclass-vit-l14", NNODES="8", NODE_RANK="")
    assert code != 0 and not found and "NODE_RANK" in stderr


PIPELINE = ["train clipcap-superclass", "train llava-7b-align", "train llava-7b-finetune"]
SCORES = ["eval coco-captions", "eval vqa-textvqa"]


def test_the_real_pipeline_goes_the_whole_way(calls, tmp_path: Path) -> None:
    (tmp_path / "data/imagenet/train").mkdir(parents=True)
    code, found, _ = calls("training/pipeline.sh", "train.log_every=5", VALIDATE="0", BLIND="1", NGPU="4")
    assert code == 0
    seen = check_calls(found)
    assert seen == [
        *("train superclass-vit-l16", "probe probe-imagenet"),
        *(PIPELINE + SCORES),
        *("eval vqa-textvqa", *SCORES, "report"),
    ]
    starts = [call[0] for call in found if "train" in call]
    assert starts == ["torchrun", "python", "deepspeed", "deepspeed"]
    assert all("train.log_every=5" in call for call in found if "train" in call)
    # One folder for everything of an encoder, and every stage takes what an earlier one made.
    runs = [w.removeprefix("run=") for c in found for w in c if w.startswith("run=")]
    assert len(set(runs)) == len(runs) and all(run.startswith("runs/pipeline-superclass-vit-l16/") for run in runs)
    parents = [w.partition("=")[2] for c in found for w in c if w.startswith(("encoder=", "model="))]
    assert set(parents) <= set(runs)
    evaluated = [c for c in found if c[1] in ("eval", "probe")]
    assert found[-1][2:-4] == [w.removeprefix("run=") for c in evaluated for w in c if w.startswith("run=")]
    align_only = next(c for c in found if "run=runs/pipeline-superclass-vit-l16/eval-align" in c)
    assert "model=runs/pipeline-superclass-vit-l16/llava-align" in align_only and align_only[-1].endswith(", align only")


def test_parts_of_the_pipeline_and_other_models(calls) -> None:
    words = {"ENCODER": "timm:vit_base_patch16_siglip_224.v2_webli", "NAME": "siglip", "LLM": "Qwen/Qwen2.5-7B"}
    more = {"STAGES": "align finetune", "FINETUNE_ARGS": "template=chatml train.lr=1e-5", "VALIDATE": "0", "LAUNCHER": "slurm"}
    code, found, stderr = calls("training/pipeline.sh", **words, **more)
    assert (code, stderr) == (0, "")
    assert check_calls(found) == PIPELINE[1:]
    assert all(call[:2] == ["sbatch", "--wait"] for call in found)
    assert f"encoder={words['ENCODER']}" in found[0] and "llm.name=Qwen/Qwen2.5-7B" in found[0]
    assert found[1][-2:] == ["template=chatml", "train.lr=1e-5"]
    for wrong in ({"SCALE": "huge"}, {"LAUNCHER": "mpi", "STAGES": "align"}, {"SCALE": "demo", "SYSTEMS": "clip"}):
        code, _, stderr = calls("training/pipeline.sh", **wrong)
        assert code == 2 and "use" in stderr


def test_a_dry_run_prints_and_starts_nothing(calls, tmp_path: Path) -> None:
    code, found, _ = calls("training/pipeline.sh", "data.workers=8", DRY_RUN="1", SYSTEM="two words")
    # Recipes are looked at, nothing is started.
    assert code == 0 and found and all(call[:2] == ["mmkit", "validate"] for call in found)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [({"STAGES": "probee align"}, "STAGES has probee"), ({"LAUNCHER": "mpi"}, "LAUNCHER=mpi: use deepspeed, torchrun or slurm")],
)
def test_words_that_the_pipeline_does_not_know_are_told_before_anything_runs(calls, words: dict[str, str], message: str) -> None:
    code, found, stderr = calls("training/pipeline.sh", **words)
    assert (code, found) == (2, []) and message in stderr


def test_the_pipeline_checks_every_recipe_before_the_first_stage(calls) -> None:
    code, found, _ = calls("training/pipeline.sh", FINETUNE_ARGS="lora.r=8", EVAL_ARGS="tasks.0.limit=5", NGPU="4")
    assert code == 0
    first = next(i for i, call in enumerate(found) if "train" in call)
    checked = [call[2:] for call in found[:first] if call[:2] == ["mmkit", "validate"]]
    assert ["llava-7b-finetune", "lora.r=8"] in checked and ["vqa-textvqa", "tasks.0.limit=5"] in checked
    # What the second stage adds is told on the same questions.
    answered = [call for call in found if "vqa-textvqa" in call and "eval" in call]
    assert len(answered) == 2 and all("tasks.0.limit=5" in call for call in answered)


def test_a_setting_is_no_encoder(calls) -> None:
    code, found, _ = calls("training/run.sh", "train.micro_batch_size=4", VALIDATE="0")
    assert code == 0 and "encoder=runs/superclass-vit-l16" in found[0] and "train.micro_batch_size=4" in found[0]


def test_evaluation_scores_both_models_and_reports(calls) -> None:
    code, found, _ = calls("eval/run.sh", "tasks.0.limit=5", BLIND="1")
    assert code == 0
    assert check_calls(found) == ["eval coco-captions", "eval vqa-textvqa"] * 2 + ["report"]
    runs = [w.removeprefix("run=") for c in found for w in c if w.startswith("run=")]
    assert len(set(runs)) == 4
    assert found[-1] == ["mmkit", "report", *runs, "--out", "runs/report"]


def test_cpu_pipeline_is_the_demo_in_shell(calls) -> None:
    code, found, _ = calls("eval/pipeline_cpu.sh", MMKIT_DEMO="runs/demo")
    assert code == 0
    seen = check_calls(found)
    encoder = ["probe demo-probe", "train demo-clipcap", "train demo-llava-align", "train demo-llava-finetune"]
    scores = ["eval demo-eval-captioner", "eval demo-eval-mllm"]
    # And the aligned model, which can only describe.
    system = ["train demo-superclass", *encoder, *scores, "eval demo-eval-mllm"]
    assert seen == ["data", *system * 2, *scores, "report"]
    trained = [w for c in found for w in c if w.startswith("run=")]
    assert len(trained) == len(set(trained))
    evaluated = [c for c in found if c[1] in ("eval", "probe")]
    runs = [w.removeprefix("run=") for c in evaluated for w in c if w.startswith("run=")]
    assert found[-1][2:-4] == runs


def test_prepare_writes_the_karpathy_split_and_ocr_tokens(calls, tmp_path: Path) -> None:
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    images = [
        {"cocoid": i, "split": split, "filepath": "val2014", "filename": f"COCO_val2014_{i:012d}.jpg",
         "sentences": [{"raw": f"caption {i} {k}", "sentid": 10 * i + k} for k in range(2)]}
        for i, split in enumerate(["train", "restval", "val", "test"])
    ]  # fmt: skip
    question = {"image_id": "a1", "question_id": 1, "question": "what?", "answers": ["x"] * 10}
    write_json(tmp_path / "data/coco/dataset_coco.json", {"images": images})
    write_json(
        tmp_path / "data/textvqa/TextVQA_0.5.1_val.json", {"data": [question, {**question, "image_id": "b2", "question_id": 2}]}
    )
    tokens = {"data": [{"image_id": "a1", "ocr_tokens": ["STOP", "now"]}]}
    write_json(tmp_path / "data/textvqa/TextVQA_Rosetta_OCR_v0.2_val.json", tokens)
    code, _, stderr = calls("eval/prepare.sh")
    assert code == 0, stderr
    coco = tmp_path / "data/coco"
    rows = [json.loads(line) for line in (coco / "karpathy_train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 4
    assert rows[0] == {"image": "val2014/COCO_val2014_000000000000.jpg", "caption": "caption 0 0"}
    from mmkit.eval.scorers.formats import read_captions, read_textvqa

    assert read_captions(str(coco / "karpathy_test.json")) == {3: ["caption 3 0", "caption 3 1"]}
    assert read_captions(str(coco / "karpathy_val.json")) == {2: ["caption 2 0", "caption 2 1"]}
    joined = tmp_path / "data/textvqa/TextVQA_0.5.1_val_ocr.json"
    found = json.loads(joined.read_text(encoding="utf-8"))["data"]
    assert [row["ocr_tokens"] for row in found] == [["STOP", "now"], []]
    assert found[0]["question"] == "what?"
    assert 1 in read_textvqa(str(joined))


def test_prepare_names_what_is_missing(calls, tmp_path: Path) -> None:
    code, found, stderr = calls("eval/prepare.sh")
    assert (code, found) == (0, [])
    assert "dataset_coco.json" in stderr and "Rosetta" in stderr


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
