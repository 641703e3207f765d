"""Synthetic run directories for the report's tests, all made by one builder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

COLOURS = ["red", "blue", "green", "yellow", "purple"]


class Runs:
    """Writes run directories as DESIGN.md section 5 lays down; every method returns the directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pictures = root / "pictures"
        self.pictures.mkdir()

    def picture(self, name: str, colour: str = "red", size: tuple[int, int] = (64, 64)) -> Path:
        path = self.pictures / name
        image = Image.new("RGB", size, "#dddddd")
        ImageDraw.Draw(image).ellipse([size[0] // 5, size[1] // 5, size[0] * 3 // 5, size[1] * 3 // 5], fill=colour)
        image.save(path)
        return path

    def run(self, name: str, kind: str, *, manifest: dict[str, Any] | None = None, **files: Any) -> Path:
        """`files`: metrics, skipped, predictions as rows; scores as the tasks object."""
        path = self.root / "runs" / name
        path.mkdir(parents=True)
        full = {
            "status": "done", "kind": kind, "stage": kind, "system": None, "mmkit": "0.1.0", "git": "0123456789ab",
            "packages": {"torch": "2.15.0", "flash": "absent"}, "hardware": {"cpu": "Test CPU", "cores": 2, "gpus": []},
            "parents": [], "data": {"fingerprint": "d" * 32}, "started": "2026-11-23T10:00:00Z", "seconds": 61.5,
            "skipped": len(files.get("skipped", [])), **(manifest or {}),
        }  # fmt: skip
        (path / "manifest.json").write_text(json.dumps(full))
        (path / "recipe.yaml").write_text(f"stage: {full['stage']}\nrun: runs/{name}\n")
        for key in ("metrics", "skipped", "predictions"):
            if key in files:
                (path / f"{key}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in files[key]))
        if "scores" in files:
            (path / "scores.json").write_text(json.dumps({"tasks": files["scores"]}))
        return path

    def train(self, name: str, stage: str, *, parents: list[Path] = (), system: str | None = None, steps: int = 60) -> Path:
        rng = random.Random(name)
        rows: list[dict[str, Any]] = [
            {
                "step": s, "samples": s * 32, "loss": 4 / (1 + s / 12) + rng.random() * 0.3, "lr": 1e-3,
                "samples_per_second": 500 + 50 * rng.random(), "data_wait": rng.random() / 10,
            }
            for s in range(1, steps + 1)
        ]  # fmt: skip
        rows.append({"step": steps, "val_loss": 0.9 + rng.random() / 10})
        entries = [
            {"role": "encoder" if i == 0 else "llm", "path": str(p), "fingerprint": p.name * 8} for i, p in enumerate(parents)
        ]
        return self.run(name, "train", manifest={"stage": stage, "system": system, "parents": entries}, metrics=rows)

    def probe(self, name: str, system: str, accuracy: float, *, parents: list[Path] = ()) -> Path:
        tasks = {t: score(t, {"accuracy": accuracy - d}) for t, d in (("linear-probe", 0.0), ("knn", 0.05))}
        entries = [{"role": "encoder", "path": str(p), "fingerprint": "f" * 32} for p in parents]
        return self.run(name, "probe", manifest={"system": system, "parents": entries}, scores=tasks)

    def eval(
        self,
        name: str,
        system: str,
        tasks: dict[str, list[dict[str, Any]]],
        *,
        model: Path | None = None,
        settings: dict[str, Any] | None = None,
        more: dict[str, Any] | None = None,
        **manifest: Any,
    ) -> Path:
        """`tasks`: name -> prediction rows (see `row`); scores are their means; `more` goes into every score object."""
        scores = {}
        for task, rows in tasks.items():
            names = list(rows[0]["score"])
            metrics = {m: sum(r["score"][m] for r in rows) / len(rows) for m in names}
            samples = [{"id": r["id"], **r["score"]} for r in rows]
            scores[task] = {**score(task, metrics, n=len(rows), per_sample=samples, **(settings or {})), **(more or {})}
        parents = [{"role": "model", "path": str(model / "model"), "fingerprint": "m" * 32}] if model else []
        rows = [{**r, "task": task} for task, found in tasks.items() for r in found]
        manifest = {"system": system, "parents": parents, **manifest}
        return self.run(name, "eval", manifest=manifest, scores=scores, predictions=rows)


def score(task: str, metrics: dict[str, float], *, n: int = 40, per_sample: Any = (), **settings: Any) -> dict[str, Any]:
    return {
        "task": task, "metrics": metrics, "ci95": {k: [v - 0.04, v + 0.04] for k, v in metrics.items()}, "n": n,
        "settings": {"rule": "official", "batch_size": 32, "decoding": "greedy", **settings}, "per_sample": list(per_sample),
    }  # fmt: skip


def row(key: int, image: Path, text: str, references: list[str], scores: dict[str, float], **more: Any) -> dict[str, Any]:
    question = more.get("question")
    prompt = f"USER: <image>\n{question}\nASSISTANT:" if question else "Describe."
    base = {"id": key, "image": str(image), "image_shown": str(image), "prompt": prompt, "question": None}
    return {**base, "prediction": text, "references": references, "score": scores, **more}


def say(images: list[Path], skill: float, *, shown: list[Path] | None = None, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Caption and question rows of a system that is right with probability `skill`."""
    rng = random.Random(seed)
    captions, answers = [], []
    for i, image in enumerate(images):
        truth = COLOURS[i % len(COLOURS)]
        more = {"image_shown": str(shown[i])} if shown else {}
        right = rng.random() < skill
        guess = truth if right else rng.choice([c for c in COLOURS if c != truth])
        references = [f"a {truth} circle on grey", f"one {truth} disc", f"there is a {truth} circle"]
        scores = {"CIDEr": 2.0 + rng.random() if right else rng.random() / 3, "Bleu_4": 0.9 if right else 0.2}
        captions.append(row(i, image, f"a {guess} circle on grey", references, scores, **more))
        for j, question in enumerate(("What colour is the circle?", "How many circles are there?")):
            gold = [truth, "1"][j]
            right = rng.random() < skill
            text, value = (gold, 1.0) if right else (["grey", "3"][j], rng.choice([0.0, 0.0, 0.3]))
            refs = [gold] * 9 + ["round"]
            answers.append(row(100 * i + j, image, text, refs, {"accuracy": value}, question=question, **more))
    return {"coco-caption": captions, "vqav2": answers}


LLAVA = {"system": "LLaVA-1.5 7B", "metrics": {"accuracy": 0.582}, "source": "LLaVA MODEL_ZOO", "conditions": "val, with OCR"}


def many(runs: Runs, *, pictures: int, questions: int, systems: int = 3, size: tuple[int, int] = (320, 240)) -> list[Path]:
    """Eval runs over many samples; the pictures are noise with a shape, so that they compress no better than photographs."""
    rng = random.Random(0)
    images = []
    for i in range(pictures):
        path = runs.pictures / f"{i:05}.jpg"
        noise = Image.frombytes("RGB", (40, 30), rng.randbytes(3600)).resize(size, Image.Resampling.BICUBIC)
        ImageDraw.Draw(noise).rectangle([40, 40, 200, 160], fill=COLOURS[i % len(COLOURS)])
        noise.save(path, quality=80)
        images.append(path)
    found = []
    for system in range(systems):
        rows = []
        for i in range(pictures * questions):
            gold = COLOURS[i % len(COLOURS)]
            right = rng.random() < 0.8 - system / 10
            text, value = (gold, 1.0) if right else rng.choice([("grey", 0.0), ("greyish " + gold, 0.3)])
            question = f"What colour is the rectangle number {i} in the picture?"
            kind = ("other", "number", "yes/no")[i % 3]
            image = images[i // questions]
            rows.append(row(i, image, text, [gold] * 10, {"accuracy": value}, question=question, type=kind))
        found.append(runs.eval(f"many-{system}", f"System {system}", {"vqav2": rows}))
    return found


def lmms_results(folder: Path, tasks: dict[str, dict[str, Any]], *, date: str = "20260101_120000", **top: Any) -> Path:
    """A results file as lmms-eval 0.7 writes it; per task: results, config, samples, n (original, effective)."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "results": {name: {"alias": name, **task["results"]} for name, task in tasks.items()},
        "group_subtasks": {},
        "configs": {
            name: {
                "task": name, "dataset_path": "lmms-lab/" + name, "test_split": "validation",
                "generation_kwargs": {"max_new_tokens": 16, "do_sample": False}, "metadata": [{"version": 0.0}],
                "lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": "\nShort answer."}},
                **task.get("config", {}),
            }
            for name, task in tasks.items()
        },
        "versions": dict.fromkeys(tasks, 0.0), "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": {},
        "n-samples": {name: {"original": t["n"][0], "effective": t["n"][1]} for name, t in tasks.items() if "n" in t},
        "config": {"model": "llava_hf", "model_args": "pretrained=llava-hf/llava-1.5-7b-hf,dtype=auto", "batch_size": "1"},
        "git_hash": "75571cf", "lmms_eval_version": "0.7.2", "date": date, "total_evaluation_time_seconds": "61.5",
        "model_name": "llava-hf/llava-1.5-7b-hf", **top,
    }  # fmt: skip
    for name, task in tasks.items():
        if "samples" in task:
            rows = "".join(json.dumps(row) + "\n" for row in task["samples"])
            (folder / f"{date}_samples_{name}.jsonl").write_text(rows, encoding="utf-8")
    path = folder / f"{date}_results.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


@pytest.fixture
def world(runs: Runs) -> list[Path]:
    """See `make_world`."""
    return make_world(runs)


@pytest.fixture
def rich(runs: Runs, world: list[Path]) -> list[Path]:
    """See `make_rich`."""
    return make_rich(runs, world)


def make_world(runs: Runs) -> list[Path]:
    """SuperClass (captioner and MLLM, with lineage), random frozen, blind; probes; 14 small pictures and a large one."""
    images = [runs.picture(f"{i:03}.png", COLOURS[i % len(COLOURS)]) for i in range(14)]
    images.append(runs.picture("large.jpg", "green", (900, 600)))
    found: list[Path] = []
    for system, skill in (("SuperClass", 0.9), ("random frozen", 0.45)):
        tag = system.split()[0].lower()
        encoder = runs.train(f"{tag}-encoder", "superclass")
        captioner = runs.train(f"{tag}-clipcap", "clipcap", parents=[encoder])
        align = runs.train(f"{tag}-align", "llava", parents=[encoder / "model"])
        mllm = runs.train(f"{tag}-tune", "llava", parents=[align])
        said = say(images, skill, seed=len(tag))
        found.append(runs.eval(f"{tag}-captions", system, {"coco-caption": said["coco-caption"]}, model=captioner))
        found.append(runs.eval(f"{tag}-vqa", system, {"vqav2": said["vqav2"]}, model=mllm))
        found.append(runs.probe(f"{tag}-probe", system, skill, parents=[encoder]))
    said = say(images, 0.2, shown=images[1:] + images[:1], seed=3)
    found.append(runs.eval("blind", "blind", said, model=runs.root / "runs" / "superclass-tune"))
    with (found[0] / "skipped.jsonl").open("w") as file:
        rows = [("7", "the file is empty"), ("9", "the file is empty"), ("11", "cut off")]
        file.writelines(json.dumps({"source": "a.tar", "key": k, "reason": why}) + "\n" for k, why in rows)
    manifest = json.loads((found[0] / "manifest.json").read_text())
    (found[0] / "manifest.json").write_text(json.dumps({**manifest, "skipped": 3}))
    return found


def make_rich(runs: Runs, world: list[Path]) -> list[Path]:
    """The world, and TextVQA with and without OCR, a published figure, a doubtful one, types, a parsed answer, a limit."""
    images = [runs.pictures / f"{i:03}.png" for i in range(14)]

    def textvqa(name: str, system: str, skill: float, count: int = 14, **settings: Any) -> Path:
        said = say(images[:count], skill, seed=5)["vqav2"]
        rows = [{**r, "type": "colour" if i % 2 == 0 else "count", "parsed": r["prediction"].upper()} for i, r in enumerate(said)]
        answers = {"total": len(rows), "empty": 0, "long": 3, "unparsed": 2, "defaulted": 0}
        parts = {"question_type": {"what": {"accuracy": 0.5, "n": count}, "how many": {"accuracy": 0.25, "n": count}}}
        more = {"answers": answers, "published": [LLAVA], "breakdown": parts}
        return runs.eval(name, system, {"textvqa-val": rows}, settings={"rule": "m4c", **settings}, more=more)

    return [
        *world,
        textvqa("ocr-a", "SuperClass", 0.8, ocr="none", notes=["3 of 28 answers have more than 5 words and can hardly match"]),
        textvqa("ocr-b", "random frozen", 0.6, ocr="none"),
        textvqa("ocr-c", "with OCR", 0.9, ocr="reference"),
        textvqa("ocr-d", "a part only", 1.0, count=5, ocr="none"),
    ]
