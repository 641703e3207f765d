"""Official scoring of a result file: ``mmkit score``, ``mmkit.score`` and the scoring half of ``mmkit eval``.

One JSON object comes out whatever the task: metrics as fractions, 95 % intervals, the settings that the numbers depend
on, and the score of every sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.result import Score, Settings, nearest
from mmkit.eval.scorers.json_files import Source
from mmkit.eval.suites import BUILT_IN, find_suite, suite_names

# Settings of every suite; each suite names its own beside them.
COMMON = ("allow_missing", "bootstrap", "seed")


def parse_settings(task: str, pairs: Mapping[str, str]) -> dict[str, Any]:
    """Turn ``key=value`` words of a command line into keyword arguments of `score`.

    Args:
        task: Name of the suite.
        pairs: Setting -> text.

    Returns:
        Setting -> value of the right type.

    Raises:
        InputError: Unknown task or setting (with the nearest one), or a value that is no number or no true/false.
    """
    out: dict[str, Any] = {}
    for key, text in pairs.items():
        _check_setting(task, key)
        if key == "allow_missing":
            if text.lower() not in {"true", "false"}:
                raise InputError(f"allow_missing is true or false, not {text!r}", where=key, mend="allow_missing=true")
            out[key] = text.lower() == "true"
        elif key in {"bootstrap", "seed"}:
            # isdigit alone accepts superscripts, which int refuses.
            if not (text.isascii() and text.isdigit()):
                raise InputError(f"{key} is a whole number from 0, not {text!r}", where=key, mend=f"{key}=1000")
            out[key] = int(text)
        else:
            out[key] = text
    return out


def check_task_settings(config: TaskConfig, where: str = "") -> None:
    """Refuse a task that could not be scored, and settings that its scorer would refuse: before hours of generation, not after.

    Args:
        config: The task.
        where: Its place in a recipe, for messages, such as ``tasks.0.``.

    Raises:
        InputError: No annotations and no server; a prompt without its question; a setting that is unknown to the suite, without
            effect here, not of its type, or of a value that the suite does not have.
    """
    given, suite = dict(config.settings), find_suite(config.task)
    if config.annotations is None and suite.submit is None:
        # There is nobody who could score the answers.
        what = f"{config.task} without annotations has no score"
        raise InputError(what, where=f"tasks: {config.task}", mend="give annotations=PATH")
    if "allow_missing" in given:
        # Set by the limit: a result that is missing for another reason is an error that must not be hidden.
        raise InputError("an evaluation answers all its questions", where="settings.allow_missing", mend="leave it out")
    for key in suite.submit_options:
        if given.pop(key, None) is not None and config.annotations is not None:
            what = f"{key} is for the server's file of a test set, whose answers are not here"
            raise InputError(what, where=f"settings.{key}", mend="leave it out, or use annotations=null")
    for key in given:
        _check_setting(config.task, key)
    if config.task == "textvqa" and "ocr" in given:
        # The score would say what the prompts do not show.
        raise InputError("ocr in settings does not change the prompts", where="ocr", mend="give ocr as a key of the task")
    _check_common(**{key: value for key, value in given.items() if key in COMMON})
    # Of a test set too, where they have no effect: a value that does not exist is a slip wherever it stands.
    _check_values(config.task, given)
    if config.task != "coco-caption" and "{question}" not in config.prompt:
        raise InputError(f"prompt {config.prompt!r} has no {{question}}", where=f"{where}prompt", mend="put it in")


def _check_values(task: str, given: Mapping[str, Any]) -> None:
    """Refuse values of the suite's own settings, by letting its scorer look at them with nothing to score.

    Raises:
        InputError: A value that the suite does not have.
    """
    # Suites of mmkit look at their settings before anything else, a test holds them to it; others may trip over the empty file.
    if task not in BUILT_IN:
        return
    options = {key: str(value) for key, value in given.items() if key not in COMMON and value is not None}
    try:
        find_suite(task).score(task, [], {}, None, Settings(options))
    except InputError as error:
        if error.where in options:
            raise


def _check_common(*, allow_missing: object = False, bootstrap: object = 0, seed: object = 0) -> None:
    """Refuse values of the common settings that only look like theirs.

    Raises:
        InputError: No true/false, or no whole number from 0.
    """
    # The text "false" would be true.
    if not isinstance(allow_missing, bool):
        what = f"allow_missing is true or false, not {allow_missing!r}"
        raise InputError(what, where="allow_missing", mend="allow_missing=true")
    for name, value in (("bootstrap", bootstrap), ("seed", seed)):
        # True is an int to Python: bootstrap=True would mean a single resample.
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InputError(f"{name} is a whole number from 0, not {value!r}", where=name, mend=f"{name}=1000")


def _check_setting(task: str, key: str) -> None:
    """Refuse a setting that this task does not have: whoever gave it believes that it has an effect."""
    own = (*find_suite(task).options, *COMMON)
    if key in own:
        return
    if key in {option for name in suite_names() for option in find_suite(name).options}:
        raise InputError(f"{key} does not apply to {task}", where=key, mend=f"leave {key} out")
    raise InputError(f"unknown setting {key!r}", where=key, mend=nearest(key, own))


def score(
    task: str,
    predictions: Source,
    annotations: Source,
    questions: Source | None = None,
    *,
    allow_missing: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
    **options: Any,
) -> Score:
    """Score a result file as the official evaluator of a task does.

    Args:
        task: One of `mmkit.eval.suites.suite_names`.
        predictions: Result file in the official format (as JSON lines, too) or in that of LLaVA's programs, or its loaded data.
        annotations: Annotation file in the official format, or its loaded dictionary.
        questions: Question file, where the task has one apart (VQAv2), to be checked against the annotations.
        allow_missing: Score the ids that have a result when some have none; the settings then say how many.
        bootstrap: Number of resamples behind the 95 % intervals; 0 leaves them out.
        seed: Seed of the resamples.
        **options: The task's own settings; each suite's module says what they do (`mmkit.eval.suites`). Captions: ``tokenizer``,
            ``python`` (PTB-compatible, the default), ``java`` (CoreNLP's) or ``none``, and ``metrics``, names with commas,
            ``bleu,rouge,cider`` by default (``meteor`` and ``spice`` need Java). VQAv2: ``rule``, ``official`` (2021, the
            default), ``2017`` or ``always`` (lmms-eval). TextVQA: ``ocr``, ``none`` or ``reference``, which is recorded only, and
            ``anls``. VizWiz: ``rule``, ``official`` or ``m4c`` (lmms-eval). GQA: ``rule``, ``llava`` (the default), ``lmms`` or
            ``official``, and ``choices``, a file. generic: ``metric``, by name, and ``tolerance`` of ``metric=numeric``.

    Returns:
        ``{"task", "metrics", "ci95", "n", "settings", "per_sample"}``; metrics are fractions (MME: points). Question answering
        adds ``answers``, counts of answers of the wrong shape, and ``breakdown``, where its files name kinds of questions.

    Raises:
        InputError: The task or a setting is unknown, or a file is wrong.
    """
    # Settings are checked before any file is read.
    suite = find_suite(task)
    for key in options:
        _check_setting(task, key)
    _check_common(allow_missing=allow_missing, bootstrap=bootstrap, seed=seed)
    # A recipe or a shell may well read rule=2017 as a number; None stands for what was not given.
    given = {key: str(value) for key, value in options.items() if value is not None}
    return suite.score(task, predictions, annotations, questions, Settings(given, allow_missing, bootstrap, seed))
