"""Imports result files of lmms-eval (versions 0.2 to 0.7): the results JSON and the samples of ``--log_samples`` beside it.

A figure shares a column with mmkit's only under the same rule, which its settings name; one that counts something else has a
metric name of its own. The rules are those of the tasks' ``utils.py`` in lmms-eval 0.7.3.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from mmkit.errors import InputError
from mmkit.eval.metrics import describe
from mmkit.eval.report.lmms_eval_files import AGAIN, PROGRAM, read_samples
from mmkit.eval.report.runs import Prediction, Run, Score
from mmkit.files import read_json


@dataclass(frozen=True)
class Known:
    """What a task of lmms-eval is in mmkit.

    Attributes:
        suite: mmkit's suite.
        name: mmkit's row name, the column of the score table.
        rule: Value of the score's ``rule``: that of mmkit's suite where it has the same one, else what is different.
        metrics: Its metric -> mmkit's.
        note: What a reader should know of it.
        scale: What a figure is divided by to become a fraction.
        settings: Further settings, as mmkit's own suites write them.
    """

    suite: str
    name: str
    rule: str = ""
    metrics: Mapping[str, str] = field(default_factory=lambda: {"exact_match": "accuracy"})
    note: str = ""
    scale: float = 1.0
    settings: Mapping[str, str] = field(default_factory=dict)


_CAPTION = {f"coco_{name}": name for name in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")}
# Its yes ratio counts the labels, not the answers, hence the other name.
_POPE = {"pope_accuracy": "accuracy", "pope_precision": "precision", "pope_recall": "recall", "pope_yes_ratio": "label_yes_ratio"}
_MMBENCH = {"gpt_eval_score": "accuracy"}
# Finds the option otherwise than VLMEvalKit's function, which is mmkit's static rule.
_STATIC = "lmms-eval: options found without an API"
_JUDGED = "lmms-eval: options found by a GPT judge"
_MMMU_NOTE = "lmms-eval up to 0.7.2 counts all 53 open questions as wrong; this file does not say that it is newer"
TASKS = {
    "coco_karpathy_test": Known("coco-caption", "coco-karpathy-test", metrics=_CAPTION, settings={"tokenizer": "java"}),
    "coco2017_cap_val": Known("coco-caption", "coco-val2017", metrics=_CAPTION, settings={"tokenizer": "java"}),
    # Since mid-2025; older versions processed the answer twice or kept unanimous answers as they are.
    "vqav2_val": Known("vqav2", "vqav2-val", "always"),
    # The same evaluator file as M4C's and LLaVA's; the prompt's OCR tokens are a setting of the task.
    "textvqa_val": Known("textvqa", "textvqa-val", "m4c"),
    # M4C's processing on both sides: mmkit's rule=m4c, not its official one.
    "vizwiz_vqa_val": Known("vizwiz", "vizwiz-val", "m4c"),
    # mmkit's own rule=lmms reads GQA, ScienceQA, POPE and MME as lmms-eval does.
    "gqa": Known("gqa", "gqa-testdev-balanced", "lmms"),
    "scienceqa": Known("scienceqa", "scienceqa-test", "lmms"),
    "scienceqa_img": Known("scienceqa", "scienceqa-img-test", "lmms"),
    # One F1 over all three splits is not the mean of three.
    "pope": Known("pope", "pope", "lmms", {**_POPE, "pope_f1_score": "f1_pooled"}),
    "pope_random": Known("pope", "pope-random", "lmms", {**_POPE, "pope_f1_score": "f1"}),
    "pope_pop": Known("pope", "pope-popular", "lmms", {**_POPE, "pope_f1_score": "f1"}),
    "pope_adv": Known("pope", "pope-adversarial", "lmms", {**_POPE, "pope_f1_score": "f1"}),
    "mme": Known(
        "mme",
        "mme",
        "lmms",
        # Misspelled until 2024.
        {"mme_perception_score": "perception", "mme_percetion_score": "perception", "mme_cognition_score": "cognition"},
    ),
    "mmbench_en_dev_static": Known("mmbench", "mmbench-en-dev", _STATIC, _MMBENCH, scale=100.0),
    "mmbench_en_dev": Known("mmbench", "mmbench-en-dev", _JUDGED, _MMBENCH, scale=100.0),
    "mmbench_cn_dev": Known("mmbench", "mmbench-cn-dev", _JUDGED, _MMBENCH, scale=100.0),
    "mmmu_val": Known("mmmu", "mmmu-val", "lmms-eval: random letter where none is found, unseeded", {"mmmu_acc": "accuracy"}),
}


def read_lmms_eval(path: Path) -> Run:
    """Read a results file as a run.

    Args:
        path: ``..._results.json``; samples are looked for in its folder.

    Returns:
        A run of kind ``eval`` that is marked as imported.

    Raises:
        InputError: The file is no results file of lmms-eval, holds no figure, or a samples file is damaged.
    """
    content = read_json(path, mend=AGAIN)
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, dict) or not isinstance(content.get("configs"), dict):
        raise InputError('not a result file of lmms-eval (it has no "results" and "configs")', where=path, mend=AGAIN)
    notes: list[str] = []
    scores: dict[str, Score] = {}
    predictions: list[Prediction] = []
    for task, row in results.items():
        if not isinstance(row, dict):
            raise InputError(f"task {task!r} is no object of metrics", where=path, mend=AGAIN)
        # A group's row carries its members' names and no figure of its own.
        if not _figures(row) or content["configs"].get(task) is None:
            continue
        samples = read_samples(path, task, notes)
        try:
            name, score, said = _task(task, row, content, samples)
        # A program's own file goes no deeper than this; an edited one may hold anything anywhere.
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise InputError(f"task {task!r} is damaged ({type(error).__name__}: {error})", where=path, mend=AGAIN) from error
        if name in scores:
            raise InputError(f"{task!r} and another task both are {name} here", where=path, mend="import them from two files")
        scores[name] = score
        predictions += said
    if not scores:
        raise InputError("no task in it has a figure", where=path, mend=AGAIN)
    try:
        return _run(path, content, scores, predictions, notes)
    except (TypeError, AttributeError) as error:
        raise InputError(f"is damaged ({type(error).__name__}: {error})", where=path, mend=AGAIN) from error


def _task(
    task: str, row: dict[str, Any], content: dict[str, Any], samples: list[dict[str, Any]]
) -> tuple[str, Score, list[Prediction]]:
    """One task: its row name here, its score, and what the model said."""
    found, config = _figures(row), content["configs"][task]
    # A task that mmkit has no suite for keeps its own names.
    known = TASKS.get(task) or Known(task, task, PROGRAM, {key.partition(",")[0]: key.partition(",")[0] for key in found})
    name = _row_name(known, config)
    score = _score(task, known, found, config, content, samples)
    ends = _ends(config, samples)
    return name, score, [_prediction(name, task, sample, known, ends) for sample in samples]


def _run(
    path: Path,
    content: dict[str, Any],
    scores: dict[str, Score],
    predictions: list[Prediction],
    notes: list[str],
) -> Run:
    """The run that a result file stands for, with a manifest like mmkit's own."""
    model, version = _model_of(content), _version(content)
    manifest = {
        "status": "imported",
        "kind": "eval",
        "stage": PROGRAM,
        "started": started(content),
        "seconds": _number(content.get("total_evaluation_time_seconds")) or 0.0,
        "git": str(content.get("git_hash") or "not recorded"),
        "mmkit": f"imported from {version}",
        "parents": [{"role": "model", "path": model, "fingerprint": ""}],
    }
    return Run(
        path=path,
        # Folders are named for the model there, files for the date: neither alone tells two imports apart.
        name=path.stem,
        kind="eval",
        stage=PROGRAM,
        # Marked in the label itself: it goes with the row into every table and into copies of them.
        system=f"{model} ({PROGRAM})",
        manifest=manifest,
        scores=scores,
        predictions=predictions,
        notes=notes,
        imported=version,
    )


def _figures(row: dict[str, Any]) -> dict[str, float]:
    """The row's numbers, by their own names; submissions, aliases and "N/A" are no figures."""
    return {key: value for key, raw in row.items() if key != "samples" and (value := _number(raw)) is not None and "," in key}


def _score(
    task: str,
    known: Known,
    found: dict[str, float],
    config: dict[str, Any],
    content: dict[str, Any],
    samples: list[dict[str, Any]],
) -> Score:
    """One task: metrics renamed, standard errors as intervals, the task's own configuration as settings."""
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for key, value in found.items():
        metric, _, chosen = key.partition(",")
        # Also ..._stderr_clt and ..._stderr_clustered.
        if "_stderr" in metric:
            continue
        name = known.metrics.get(metric, metric)
        # Two filters of one metric are two readings of the same answers.
        name += "" if chosen == "none" else f" ({chosen})"
        metrics[name] = value / known.scale
        # Questions on one picture are not independent, so the clustered error is the better one where there is one.
        names = [f"{metric}_stderr_clustered,{chosen}", f"{metric}_stderr,{chosen}"]
        error = next((found[n] for n in names if n in found), None)
        if error is not None:
            low, high = ((value + sign * 1.96 * error) / known.scale for sign in (-1, 1))
            # A share goes from 0 to 1; the normal distribution that the error is for does not know that.
            share = describe(name).unit == "%"
            intervals[name] = (max(0.0, low), min(1.0, high)) if share else (low, high)
    total, asked = _counts(task, content)
    settings = _settings(task, known, config, content, samples)
    if 0 < asked < total:
        settings["scored"] = f"{asked} of {total}"
    return Score(
        task=known.suite,
        metrics=metrics,
        ci95=intervals,
        n=asked or len(samples),
        settings=settings,
        per_sample=[{"id": _key(task, s), **_sample_scores(s, known)} for s in samples],
    )


def _settings(
    task: str, known: Known, config: dict[str, Any], content: dict[str, Any], samples: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The conditions under which the figure was made, in the words of mmkit's own settings where there are such."""
    ends, generation = _ends(config, samples), config.get("generation_kwargs") or {}
    run = content.get("config") or {}
    settings: dict[str, Any] = {
        "evaluator": _version(content),
        "lmms-eval task": task,
        "task version": (content.get("versions") or {}).get(task),
        "data": ", ".join(str(config[k]) for k in ("dataset_path", "dataset_name", "test_split") if config.get(k)),
        **({"prompt": f"{ends[0]}{{question}}{ends[1]}"} if ends else {}),
        "decoding": decoding_of(generation),
        "generation_kwargs": generation,
        "batch_size": run.get("batch_size"),
        "interval": "1.96 standard errors of lmms-eval",
        "model": _model_of(content),
        **known.settings,
    }
    if known.rule:
        settings["rule"] = known.rule
    if known.suite == "textvqa":
        settings["ocr"] = _ocr(config)
    notes = [known.note] if known.note else []
    if known.suite == "mmmu" and _release(_version(content)) < (0, 7, 3):
        notes.append(_MMMU_NOTE)
    return {**settings, **({"notes": notes} if notes else {})}


def _ends(config: dict[str, Any], samples: Sequence[dict[str, Any]]) -> tuple[str, str] | None:
    """What stands before and after every question: as the task says, else the lines that all prompts end with; None untold."""
    kwargs = config.get("lmms_eval_specific_kwargs") or config.get("model_specific_prompt_kwargs") or {}
    if kwargs:
        # Keyed by model family in the file, with the chosen entry merged in by newer versions.
        told = {**(kwargs.get("default") or {}), **{k: v for k, v in kwargs.items() if not isinstance(v, dict)}}
        return str(told.get("pre_prompt") or ""), str(told.get("post_prompt") or "")
    prompts = sorted({_text(sample.get("input"))[::-1] for sample in samples})
    # What the first and the last in order begin with, all between them do.
    pairs = zip(prompts[0], prompts[-1], strict=False) if len(prompts) > 1 else []
    ending = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))[::-1]
    # Whole lines alone: all questions end with the same mark.
    return ("", ending[ending.index("\n") :]) if "\n" in ending else None


def decoding_of(kwargs: Mapping[str, Any]) -> str:
    """A task's ``generation_kwargs`` in the words of mmkit's own scores; what is left out means greedy there."""
    beams, heat = int(_number(kwargs.get("num_beams")) or 1), _number(kwargs.get("temperature")) or 0.0
    if kwargs.get("do_sample", heat > 0):
        given = {key: _number(kwargs.get(key)) for key in ("temperature", "top_p", "top_k")}
        return "sample, " + ", ".join(f"{key} {value:g}" for key, value in given.items() if value is not None)
    return f"beam {beams}" if beams > 1 else "greedy"


def _row_name(known: Known, config: dict[str, Any]) -> str:
    """The task's row name; TextVQA with OCR tokens is another row."""
    return f"{known.name}-ocr" if known.suite == "textvqa" and _ocr(config) == "reference" else known.name


def _ocr(config: dict[str, Any]) -> str:
    """Whether the prompt holds the data set's OCR tokens; the default of lmms-eval is that it does not."""
    kwargs = config.get("lmms_eval_specific_kwargs") or config.get("model_specific_prompt_kwargs") or {}
    chosen = {**(kwargs.get("default") or {}), **kwargs}
    return "reference" if chosen.get("ocr") else "none"


def _counts(task: str, content: dict[str, Any]) -> tuple[int, int]:
    """How many samples the task has, and how many were asked."""
    counts = (content.get("n-samples") or {}).get(task) or {}
    original, effective = (_number(counts.get(k)) or 0 for k in ("original", "effective"))
    return int(original), int(effective)


def _version(content: dict[str, Any]) -> str:
    """Program and version: a release, or branch@commit of the folder it was started in; outside of a checkout it has none."""
    told = [str(content.get(key) or "") for key in ("lmms_eval_version", "git_hash")]
    version = next((text for text in told if text and text != "unknown@unknown"), "")
    return f"{PROGRAM} {version}" if version else f"{PROGRAM}, version not recorded"


def started(content: dict[str, Any]) -> str:
    """The file's date as a manifest has it, in UTC where the file tells its time zone; any other text as it is."""
    text = str(content.get("date") or "")
    try:
        local = datetime.strptime(text, "%Y%m%d_%H%M%S")
    except ValueError:
        return text
    # Its default is Singapore's time, wherever it runs, so that a guess would be hours off.
    named = ((content.get("config") or {}).get("resolved_cli_args") or {}).get("timezone")
    try:
        there = local.replace(tzinfo=ZoneInfo(str(named)))
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return f"{local:%Y-%m-%dT%H:%M:%S} ({named or 'time zone not recorded'})"
    return f"{there.astimezone(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"


def _release(version: str) -> tuple[int, ...]:
    """The release in a version text; of a checkout none, which counts as older than any."""
    found = re.search(r"\b(\d+)\.(\d+)(?:\.(\d+))?", version)
    return tuple(int(part or 0) for part in found.groups()) if found else ()


def _model_of(content: dict[str, Any]) -> str:
    """The model: its path where the arguments say it, else its kind."""
    if content.get("model_name"):
        return str(content["model_name"])
    run = content.get("config") or {}
    arguments = run.get("model_args") or ""
    if isinstance(arguments, dict):
        arguments = ",".join(f"{k}={v}" for k, v in arguments.items())
    found = re.search(r"(?:^|,)(?:pretrained|model|model_version|model_name)=([^,]+)", str(arguments))
    return found.group(1) if found else str(run.get("model") or "unnamed model")


def _key(task: str, sample: dict[str, Any]) -> str:
    """An id that only lmms-eval's own samples share: its doc_id is a position, not a question id."""
    return f"{task}:{sample['doc_id']}"


def _sample_scores(sample: dict[str, Any], known: Known) -> dict[str, float]:
    """The sample's scores under mmkit's metric names; some metrics keep theirs in an object."""
    scores = {}
    for key, name in known.metrics.items():
        raw = sample.get(key)
        value = _number(raw.get("score") if isinstance(raw, dict) else raw)
        if value is not None:
            scores[name] = value
    # Precision, recall and F1 carry the same right-or-wrong; a mean of it is none of them.
    return {k: v for k, v in scores.items() if k == "accuracy"} or scores


def _prediction(name: str, task: str, sample: dict[str, Any], known: Known, ends: tuple[str, str] | None) -> Prediction:
    """A sample as a row of predictions."""
    answer = sample["filtered_resps"]
    while isinstance(answer, list) and answer:
        answer = answer[0]
    prompt = _text(sample.get("input"))
    target = _text(sample.get("target"))
    before, after = ends or ("", "")
    question = prompt.removeprefix(before).removesuffix(after)
    image = _image(task, sample)
    return Prediction(
        task=name,
        id=_key(task, sample),
        image=image,
        image_shown=image,
        prompt=prompt,
        text=_text(answer),
        # Python's None as text: the task has no single right answer to name.
        references=[] if target in ("", "None") else [target],
        question=question or None if known.suite != "coco-caption" else None,
        score=_sample_scores(sample, known),
    )


def _image(task: str, sample: dict[str, Any]) -> str:
    """The sample's first picture where version 0.7.3 or newer found its name, else a name of its own for each sample."""
    media = sample.get("input_media")
    named = media[0] if isinstance(media, list) and media and isinstance(media[0], str) else ""
    if named.startswith("data:"):
        # The bytes themselves: their hash still tells which questions are on one picture.
        return f"{PROGRAM}/{hashlib.sha256(named.encode()).hexdigest()[:16]}"
    return named or f"{PROGRAM}/{_key(task, sample)}"


def _text(value: Any) -> str:
    if value is None or value == []:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: Any) -> float | None:
    """A finite number, also one that is written as text (the time); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
