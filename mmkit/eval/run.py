"""Evaluate one model on some tasks: generate, write the official result files, score."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from PIL import Image

from mmkit.config import EvalRecipe, TaskConfig
from mmkit.data.images import decode_image
from mmkit.data.skipped import LeftOut, SampleError
from mmkit.errors import InputError
from mmkit.eval.examples import Example, Id
from mmkit.eval.score import score
from mmkit.eval.suites import find_suite
from mmkit.eval.tasks import load_task, shuffle_pictures
from mmkit.files import hash_file, hash_text, write_json
from mmkit.models.inference import Predictor, load_model
from mmkit.run import Parent, Run, append_jsonl, one_process, resolve_parent

logger = logging.getLogger(__name__)


def run_eval(recipe: EvalRecipe, *, restart: bool = False) -> Run:
    """Run an evaluation; returns at once when it is done.

    Raises:
        InputError: Unfinished model, broken files, too many unreadable pictures, or a task that the model cannot do.
    """
    run = Run(Path(recipe.run))
    parent = resolve_parent("model", recipe.model)
    # Under a launcher every process would generate the same answers and write the same files.
    one_process("eval")
    state = run.state(recipe, [parent], restart=restart)
    # Before files and model are opened, so that a finished pipeline can be run again in seconds.
    if state == "done":
        return run
    # Everything that can be wrong with the files is found before the model is loaded.
    examples = {_name(task, recipe.tasks): load_task(task) for task in recipe.tasks}
    model: Predictor = load_model(recipe.model)
    for task in recipe.tasks:
        if model.kind == "encoder" or (model.kind == "captioner" and task.task != "coco-caption"):
            raise InputError(f"a model of kind {model.kind} cannot do {task.task}", where=recipe.model, mend="use an MLLM")
    # For the manifest alone: a run that starts anew has nothing to compare it with.
    fingerprint = hash_text(*(hash_file(Path(p)) for t in recipe.tasks for p in (t.annotations, t.questions) if p))
    # An evaluation is minutes, not days: an interrupted one starts anew.
    run.start(recipe, [parent], state="new" if state == "continue" else state, data_fingerprint=fingerprint, kind="eval")
    scores = {}
    for task in recipe.tasks:
        name = _name(task, recipe.tasks)
        scores[name] = _run_task(name, task, examples[name], model, recipe, run, parent)
    write_json(run.path / "scores.json", {"tasks": scores})
    run.finish("done")
    return run


def _name(task: TaskConfig, tasks: tuple[TaskConfig, ...]) -> str:
    """Name of a task in the scores: its own, with the OCR mode where both are run."""
    same = [t for t in tasks if t.task == task.task]
    if len(same) == 1:
        return task.task
    names = [f"{t.task}+ocr" if t.ocr == "reference" else t.task for t in same]
    if len(set(names)) < len(names):
        # Scores are kept by name: the second result would replace the first.
        raise InputError(f"task {task.task} is listed twice with the same OCR mode", where="tasks", mend="use two eval runs")
    return f"{task.task}+ocr" if task.ocr == "reference" else task.task


def _run_task(
    name: str, task: TaskConfig, examples: list[Example], model: Predictor, recipe: EvalRecipe, run: Run, parent: Parent
) -> dict[str, Any]:
    """Generate and score one task; returns its score object."""
    # Only what the model sees changes: ids, questions and references stay those of the true picture.
    shown = shuffle_pictures(examples, recipe.seed) if recipe.blind else examples
    began = time.monotonic()
    predictions = generate(shown, model, task, recipe, run)
    seconds = time.monotonic() - began
    results = run.path / "results" / f"{name}.json"
    # Scored from the written file, not from memory: the score is that of what can be handed to an evaluation server.
    find_suite(task.task).write_results(results, examples, predictions)
    # With a limit most ids lack a result on purpose; without one a missing id stays an error.
    subset = task.limit is not None
    found = score(task.task, results, Path(str(task.annotations)), task.questions, allow_missing=subset, **task.settings)
    generation = task.generation
    found["settings"] |= {
        # One prompt for all captions is shown as it was asked; questions differ, so theirs is shown as a template.
        "prompt": "" if model.kind == "captioner" else examples[0].prompt if task.task == "coco-caption" else task.prompt,
        "decoding": generation.describe(),
        "max_new_tokens": generation.max_new_tokens,
        "batch_size": generation.batch_size,
        "blind": recipe.blind,
        "model": recipe.model,
        "model_fingerprint": parent.fingerprint,
        "samples_per_second": round(len(examples) / max(seconds, 1e-9), 2),
    }
    if task.task == "textvqa":
        found["settings"]["ocr"] = task.ocr
    # Metrics are the floats of a row; the id is a whole number.
    by_id = {row["id"]: {k: v for k, v in row.items() if isinstance(v, float)} for row in found["per_sample"]}
    rows = [
        {
            "task": name,
            "id": truth.id,
            "image": truth.images[0].name,
            # Differs from "image" in a blind run; the report shows both.
            "image_shown": seen.images[0].name,
            "prompt": seen.prompt if model.kind == "mllm" else "",
            "question": truth.question,
            "prediction": predictions[truth.id],
            "references": truth.references,
            "score": by_id[truth.id],
        }
        for truth, seen in zip(examples, shown, strict=True)
    ]
    append_jsonl(run.path / "predictions.jsonl", rows)
    metrics = ", ".join(f"{k} {v:.3f}" for k, v in found["metrics"].items())
    logger.info("%s: %s (n %d): %s", "/".join(run.path.parts[-2:]), name, found["n"], metrics)
    return found


def generate(examples: list[Example], model: Predictor, task: TaskConfig, recipe: EvalRecipe, run: Run) -> dict[Id, str]:
    """Predictions by id, in the order of the examples.

    Batches are formed by prompt length, so that little is padded. An unreadable picture is listed in skipped.jsonl and its
    prediction is empty, which scores as wrong: the denominator stays the official one.

    Raises:
        InputError: More pictures are unreadable than allowed.
    """
    # Length in characters stands for that in tokens; the id makes the batches the same in every run.
    order = sorted(examples, key=lambda e: (len(e.prompt), e.id))
    size = task.generation.batch_size
    predictions: dict[Id, str] = {}
    lost = 0  # of this task alone: the limit is a share of its examples
    for start in range(0, len(order), size):
        batch, images = [], []
        for example in order[start : start + size]:
            try:
                images.append(_open(example, recipe))
                batch.append(example)
            except SampleError as error:
                run.skip([LeftOut(example.images[0].name, str(example.id), str(error))])
                predictions[example.id] = ""
                lost += 1
        # After every batch: a wrong image_root ends the run at once, not after the last picture.
        if lost > recipe.max_skipped * len(examples):
            raise InputError(
                f"{lost} of {len(examples)} pictures cannot be used, over the limit of {recipe.max_skipped:.2%}",
                where=run.path / "skipped.jsonl",
                mend="check image_root and image_name, or raise max_skipped",
            )
        # All pictures of a batch may have been unreadable, and no model takes an empty batch.
        if batch:
            # A captioner refuses prompts, and caption examples carry one whoever is asked.
            prompts = [e.prompt for e in batch] if any(e.prompt for e in batch) and model.kind == "mllm" else None
            # All of them, so that nothing is left to the model's own settings: the score's conditions name these.
            texts = model.predict(images, prompts, **task.generation.model_dump(exclude={"batch_size"}))
            predictions |= {e.id: text for e, text in zip(batch, texts, strict=True)}
    # Back from order of length to that of the data set, in which the result file is written.
    return {e.id: predictions[e.id] for e in examples}


def _open(example: Example, recipe: EvalRecipe) -> Image.Image:
    """The picture of an example."""
    return decode_image(example.images[0].read(recipe.max_bytes), max_pixels=recipe.max_pixels)
