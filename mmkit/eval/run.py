"""Evaluate one model on some tasks: generate, write the official result files, score.

On several processes each answers its share of the questions; the main one merges the answers and scores them. An interrupted
evaluation goes on from the answers that are on disk.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkit.config import EvalRecipe, TaskConfig
from mmkit.distributed.preemption import Preemption
from mmkit.distributed.ranks import Ranks
from mmkit.errors import InputError, LostError, StoppedError
from mmkit.eval.examples import Example, Id
from mmkit.eval.generation import Generator, check_lost
from mmkit.eval.parts import Answers, read_parts, remove_parts, restore_parts
from mmkit.eval.predictions import FOLDER, PictureFiles, prediction_rows, write_predictions
from mmkit.eval.result import Score, answer_shapes, make_score
from mmkit.eval.reuse import AnswerCache, model_fingerprint
from mmkit.eval.score import score
from mmkit.eval.suites import find_suite
from mmkit.eval.tasks import check_places, load_task, shuffle_pictures
from mmkit.files import Writing, hash_file, hash_folder, hash_text, write_json
from mmkit.models.inference import kind_of, load_model
from mmkit.run import Parent, Run, State, hardware, resolve_parent

logger = logging.getLogger(__name__)
# Folder of what servers and official tools take, in the run directory.
SUBMISSIONS = "submission"
# Seconds after which a network disk has shown a new file everywhere; NFS keeps what it knows of a folder for up to 60.
_LATE = 90.0


@dataclasses.dataclass(frozen=True)
class Asked:
    """A task with its questions.

    Attributes:
        name: In scores.json and the report.
        config: The task.
        examples: As the data set has them.
        shown: As the model sees them.
    """

    name: str
    config: TaskConfig
    examples: list[Example]
    shown: list[Example]


def run_eval(recipe: EvalRecipe, *, restart: bool = False) -> Run:
    """Run an evaluation, or its share of one that a launcher started on many processes; returns at once when it is done.

    Raises:
        InputError: Unfinished model, broken files, too many unreadable pictures, or a task that the model cannot do.
        StoppedError: A signal came; the answers so far are on disk.
        LostError: Another process is gone.
    """
    # From the environment: of a finished run the answer comes before anything heavy.
    run = Run(Path(recipe.run), write=int(os.environ.get("RANK", "0")) == 0)
    parent = resolve_parent("model", recipe.model)
    # Before files and model are opened, so that a finished pipeline can be run again in seconds.
    if run.state(recipe, [parent], restart=restart) == "done":
        # What a kill in the last moment left behind.
        remove_parts(run.path)
        return run
    with Preemption() as preemption:
        ranks = Ranks(preemption)
        try:
            _run_on(ranks, recipe, run, parent, restart=restart)
        except StoppedError:
            # A run that had not begun has nothing to note down.
            if run.manifest:
                run.finish("stopped")
            ranks.close()
            raise
        except InputError as error:
            ranks.refuse(error)
            # It may name skipped.jsonl, and be about pictures that another process has met.
            if run.manifest:
                run.skip([left for answers in read_parts(run.path).values() for left in answers.left_out])
            ranks.close()
            raise
        except LostError:
            raise
        except RuntimeError as error:
            # Each library reports a lost process in its own words.
            explained = ranks.explain(error)
            if explained is error:
                raise
            raise explained from None
        finally:
            run.unlock()
    return run


def _run_on(ranks: Ranks, recipe: EvalRecipe, run: Run, parent: Parent, *, restart: bool) -> None:
    """Answer and score all tasks on the processes of a launcher."""
    # Before anything is read or written: of two starts of one run the second must not disturb the first.
    ranks.on_main(run.lock)
    kind = kind_of(parent)
    # Everything that can be wrong with the files is found before the model is loaded.
    check_places(recipe.tasks)
    tasks = [_ask(task, recipe, kind) for task in recipe.tasks]
    # Every process asks before any process writes; the answer is the same for all.
    state = run.state(recipe, [parent], restart=restart)
    ranks.meet()
    ranks.on_main(lambda: _start(run, recipe, parent, state, tasks))
    _await_shared(run, (run.path / "manifest.json").is_file)
    # All of them before anyone adds to it: what is left is shared out by what everybody knows.
    known = read_parts(run.path)
    ranks.meet()
    # A GPU may round another way than the next one.
    computer = " ".join([ranks.device.type, *hardware()["gpus"][:1]])
    generator = Generator(
        lambda: load_model(recipe.model, ranks.device),
        recipe,
        run,
        ranks,
        lambda: AnswerCache(model_fingerprint(parent), computer),
    )
    scores: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for task in tasks:
        ranks.look()
        generator.answer(task.name, task.config, task.shown, known[task.name])
        ranks.meet()
        ranks.on_main(lambda task=task: rows.extend(_score(task, recipe, run, parent, kind, scores)))  # type: ignore[misc]
    generator.close()
    # The last meeting: who looked for signals after it would call a run stopped whose parts are gone.
    ranks.on_main(lambda: _finish(run, scores, rows))
    ranks.close()


def _start(run: Run, recipe: EvalRecipe, parent: Parent, state: State, tasks: Sequence[Asked]) -> None:
    """Begin or go on, on the main process. Raises InputError: the run goes on with other questions, or was edited."""
    if state == "continue" and run.finished:
        # Another way to score: whatever is asked as before has its answer.
        restore_parts(run.path, {task.name: {e.id: e.prompt for e in task.shown} for task in tasks})
    run.start(recipe, [parent], state=state, data_fingerprint=_data_hash(recipe), kind="eval")
    # Only now: a start that is refused leaves a finished run as it was. What was lost before is tried again.
    run.forget_skipped()


def _await_shared(run: Run, there: Callable[[], bool]) -> None:
    """Wait for what a process of another machine wrote: a network disk may show it late, a disk of that machine's own never.

    Raises:
        InputError: It does not come.
    """
    until = time.monotonic() + _LATE
    while not there():
        if time.monotonic() > until:
            what = "what another process of this evaluation has written here cannot be seen"
            raise InputError(what, where=run.path, mend="choose a run=DIR on a disk that all machines share")
        time.sleep(0.5)


def _ask(task: TaskConfig, recipe: EvalRecipe, kind: str) -> Asked:
    """A task's questions.

    Raises:
        InputError: The model cannot do the task, or a file is broken.
    """
    if kind == "encoder" or (kind == "captioner" and task.task != "coco-caption"):
        raise InputError(f"a model of kind {kind} cannot do {task.task}", where=recipe.model, mend="use an MLLM")
    if kind == "captioner" and task.generation.cache == "static":
        raise InputError("generation.cache=static is for MLLMs", where=task.task, mend="leave it out for a captioner")
    examples = load_task(task)
    # Only what the model sees changes: ids, questions and references stay those of the true picture.
    shown = shuffle_pictures(examples, recipe.seed) if recipe.blind else examples
    if kind == "captioner":
        # It refuses prompts, and caption examples carry one whoever is asked.
        shown = [dataclasses.replace(e, prompt="") for e in shown]
    return Asked(_name(task, recipe.tasks), task, examples, shown)


def _name(task: TaskConfig, tasks: Sequence[TaskConfig]) -> str:
    """Name of a task in the scores: its own, or its suite's, with the OCR mode where both are run.

    Raises:
        InputError: Two tasks would have the same.
    """

    def name(one: TaskConfig) -> str:
        both = {t.ocr for t in tasks if t.task == one.task and t.name is None} == {"none", "reference"}
        return one.name or (f"{one.task}+ocr" if both and one.ocr == "reference" else one.task)

    if [name(one) for one in tasks].count(name(task)) > 1:
        # Scores are kept by name: the second result would replace the first.
        what = f"task {name(task)} is listed twice with the same OCR mode"
        raise InputError(what, where="tasks", mend="give each a name, or use two eval runs")
    return name(task)


def _data_hash(recipe: EvalRecipe) -> str:
    """Hash of the tasks' files: a run that goes on with other questions would be another run."""
    named = [name for task in recipe.tasks for name in (task.annotations, task.questions) if name]
    folders = {name for name in named if Path(name).is_dir()}
    return hash_text(*(hash_folder(Path(name)) if name in folders else hash_file(Path(name)) for name in named))


def _score(task: Asked, recipe: EvalRecipe, run: Run, parent: Parent, kind: str, scores: dict[str, Any]) -> list[dict[str, Any]]:
    """Write a task's official results and score them; returns the rows of its predictions."""
    config = task.config
    # Of all processes and starts.
    answers = read_parts(run.path)[task.name]
    if any(e.id not in answers.texts for e in task.examples):
        _await_shared(run, lambda: all(e.id in read_parts(run.path)[task.name].texts for e in task.examples))
        answers = read_parts(run.path)[task.name]
    run.skip(answers.left_out)
    check_lost(len(answers.left_out), len(task.examples), recipe.max_skipped, run)
    # Back from the order of length to that of the data set, in which the result file is written.
    texts = {e.id: answers.texts[e.id] for e in task.examples}
    results = run.path / "results" / f"{task.name}.json"
    # Scored from the written file, not from memory: the score is that of what can be handed to an evaluation server.
    find_suite(config.task).write_results(results, task.examples, texts)
    submission = _write_submission(task, texts, run)
    found = _unscored(config, texts, submission) if config.annotations is None else _scored(config, results, config.annotations)
    found["settings"] |= _settings(task, recipe, parent, kind, answers)
    notes = _doubts(answers, len(texts), config.generation.max_new_tokens)
    for note in notes:
        logger.warning("%s: %s", task.name, note)
    if notes:
        found["settings"]["notes"] = [*found["settings"].get("notes", []), *notes]
    if submission is not None:
        # Below the run directory, which may move.
        found["submission"] = submission
    if config.published:
        found["published"] = [published.model_dump() for published in config.published]
    scores[task.name] = found
    metrics = ", ".join(f"{k} {v:.3f}" for k, v in found["metrics"].items()) or "no score"
    logger.info("%s: %s (n %d): %s", "/".join(run.path.parts[-2:]), task.name, found["n"], metrics)
    files = PictureFiles(run.path)
    return prediction_rows(task.name, task.examples, task.shown, texts, found["per_sample"], files, cut=answers.cut)


def _doubts(answers: Answers, total: int, max_new_tokens: int) -> list[str]:
    """What a reader should know of how the answers came about."""
    notes = []
    if answers.lost:
        # By some rules an empty answer is wrong, by others it counts as the default.
        notes.append(f"{len(answers.lost)} of {total} answers are empty since a picture could not be used (skipped.jsonl)")
    if answers.cut:
        notes.append(f"{len(answers.cut)} of {total} answers were cut at max_new_tokens={max_new_tokens}, before their end")
    return notes


def _scored(config: TaskConfig, results: Path, annotations: str) -> Score:
    """The score of a result file."""
    # With a limit most ids lack a result on purpose; without one a missing id stays an error.
    subset = config.limit is not None
    return score(config.task, results, Path(annotations), config.questions, allow_missing=subset, **config.settings)


def _unscored(config: TaskConfig, texts: Mapping[Id, str], submission: str | None) -> Score:
    """What stands in place of the score of a test set, which only the server can give: counts and no metrics."""
    counts, notes = answer_shapes(list(texts.values()))
    notes.insert(0, f"a test set without answers has no score here; the file for the server is {submission}")
    return make_score(config.task, {}, None, settings={}, per_sample=[], notes=notes, n=len(texts), answers=counts)


def _write_submission(task: Asked, texts: Mapping[Id, str], run: Run) -> str | None:
    """Write what the suite's server or official tool takes; returns its path in the run directory.

    None where there is neither, or where only the first questions of an annotated set were asked.
    """
    config = task.config
    if config.annotations is not None and config.limit is not None:
        return None
    suite = find_suite(config.task)
    if suite.submit is None:
        return None
    # A folder for each task: the server's names of files are the same for all splits.
    folder = run.path / SUBMISSIONS / task.name
    with Writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    written = suite.write_submission(folder, task.examples, texts, config.settings)
    assert written is not None
    return str(written.relative_to(run.path))


def _settings(task: Asked, recipe: EvalRecipe, parent: Parent, kind: str, answers: Answers) -> dict[str, Any]:
    """What the figures depend on beside the rule, and what they took."""
    config, generation = task.config, task.config.generation
    # One prompt for all captions is shown as it was asked; questions differ, so theirs is shown as a template.
    one = task.examples[0].prompt if config.task == "coco-caption" else config.prompt
    return {
        "prompt": "" if kind == "captioner" else one,
        "decoding": generation.describe(),
        "max_new_tokens": generation.max_new_tokens,
        "batch_size": generation.batch_size,
        "cache": generation.cache,
        "blind": recipe.blind,
        "model": recipe.model,
        "model_fingerprint": parent.fingerprint,
        "left_out": len(answers.lost),
        "cut": len(answers.cut),
        "answers_from_cache": len(answers.from_cache),
        "speed": answers.speed(),
        **({"ocr": config.ocr} if config.task == "textvqa" else {}),
        **answers.settings,
    }


def _finish(run: Run, scores: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the product; the parts go when all of it is there and is known to be."""
    write_json(run.path / "scores.json", {"tasks": scores})
    write_predictions(run.path / "predictions.jsonl", rows)
    run.finish("done")
    # Last: killed before, the run would be unfinished and all answers gone.
    remove_parts(run.path)
    for folder in ("results", FOLDER, SUBMISSIONS):
        # Half of a file or folder that a kill cut off.
        for path in list((run.path / folder).rglob(".*")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
