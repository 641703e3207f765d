"""Under which conditions a score was made: prompt, OCR, rule, tokenizer, decoding, batch size, n, model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmkit.eval.report.runs import Prediction, Run, Score
from mmkit.eval.report.systems import Condition, Row

# Printed name -> the keys of a score's settings that hold it, in the order of the page.
KNOWN = {
    "Prompt": ("prompt", "prompts", "prompt_template"),
    "OCR": ("ocr", "ocr_mode", "ocr_tokens"),
    "Rule": ("rule",),
    "Tokenizer": ("tokenizer",),
    "Decoding": ("decoding", "generation", "generate"),
    "Batch size": ("batch_size",),
}
# Scores that differ in one of these answer different questions: they never share a column.
APART = ("OCR", "Rule")
# Those that differ in one of these share it, and are marked: asked otherwise, the same system gives other figures.
UNLIKE = ("Tokenizer", "Prompt", "Decoding")
_QUOTED, _BEFORE = 80, 30  # letters of a prompt in a line, and of those before the first difference
FINGERPRINT_KEYS = ("fingerprint", "model_fingerprint", "model")


def conditions(rows: Sequence[Row]) -> dict[str, list[Condition]]:
    """Task -> its conditions; a setting that differs between systems has one line per value.

    Args:
        rows: The score table's rows.

    Returns:
        Conditions in a fixed order: the known ones first, then any other setting by name.
    """
    tasks: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        for task, score in row.scores.items():
            tasks.setdefault(task, {})[row.label] = settings_of(score, task, row.run_of(task))
    return {task: _lines(by_system) for task, by_system in tasks.items()}


def settings_of(score: Score, task: str, run: Run) -> dict[str, str]:
    """All conditions of one score as printed text, in the order of the page.

    Args:
        score: The score.
        task: Its name in ``scores.json``.
        run: The run it belongs to; stands in for what the settings leave out.

    Returns:
        Printed name -> value.
    """
    left = dict(score.settings)
    found: dict[str, str] = {}
    for name, keys in KNOWN.items():
        # Taken out as they are printed: whatever is left at the end is printed too, so no condition is lost.
        given = [left.pop(key) for key in keys if key in left]
        if given:
            found[name] = flat(given[0]) or "none"
        # A score that does not say its prompt still has it in its predictions; another program's hold question and prompt in one.
        elif name == "Prompt" and not run.imported and (prompt := prompt_of(run, task)):
            found[name] = prompt
    found["n"] = str(score.n)
    # Taken out even where the manifest names the model, which would stand there twice otherwise.
    named = [flat(left.pop(key)) for key in FINGERPRINT_KEYS if key in left]
    found["Model"] = model_of(run) or ", ".join(map(short, named)) or "not recorded"
    found.update({key: flat(value) or "none" for key, value in sorted(left.items())})
    return found


def variant_of(score: Score) -> tuple[tuple[str, str], ...]:
    """The conditions that decide in which column of its task a score stands, as (name, value) pairs."""
    return tuple((name, value) for name in APART if (value := _setting(score, name)))


def departures(score: Score, usual: Score) -> list[str]:
    """In what a score of the same column was made otherwise than the column's first one, so that the two do not compare.

    Args:
        score: The score.
        usual: The column's first score.

    Returns:
        One line for each difference in the data, in `UNLIKE` or in the number of samples; none where the two compare.
    """
    other = other_data(score, usual)
    lines = [f"data {other[0]}, the column's first has {other[1]}"] if other else []
    lines += [f"{own}, the column's first has {there}" for own, there in unlike(score, usual)]
    # A limit, and results with gaps, both show in the number of samples.
    if score.n != usual.n:
        lines.append(f"{score.n} samples, the column's first has {usual.n}")
    return lines


def other_data(score: Score, other: Score) -> tuple[str, str] | None:
    """Fingerprints of the data of two scores of one task, where they are known to be of other data; None where not."""
    if score.data is None or other.data is None or score.data[1] != other.data[1] or score.data[0] == other.data[0]:
        return None
    return short(score.data[0]), short(other.data[0])


def unlike(score: Score, other: Score) -> list[tuple[str, str]]:
    """The settings of `UNLIKE` in which two scores of one task differ.

    Args:
        score: A score.
        other: What it is held against.

    Returns:
        For each such setting its name and value here, and its value there.
    """
    found = []
    for name in UNLIKE:
        own, there = _setting(score, name), _setting(other, name)
        # A captioner takes no prompt and a bare score tells no decoding: only what both have can differ. The tokenizer's
        # default is known to no reader, so that saying nothing differs from saying one.
        if own == there or (name != "Tokenizer" and not (own and there)):
            continue
        told = _apart(own, there) if name == "Prompt" else (own or "not recorded", there or "not recorded")
        found.append((f"{name.lower()} {told[0]}", told[1]))
    return found


def _apart(one: str, two: str) -> tuple[str, str]:
    """Two long texts in quotes, each cut to where they begin to differ; line breaks as a sign, since they may be all of it."""
    shared = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    # Some words in front tell where in the prompt it is.
    start = 0 if shared < _BEFORE else max(one.find(" ", shared - _BEFORE, shared) + 1, shared - _BEFORE)
    parts = [
        ("…" if start else "") + text[start : start + _QUOTED] + ("…" if text[start + _QUOTED :] else "") for text in (one, two)
    ]
    first, second = (f"“{part}”".replace("\n", "⏎") for part in parts)
    return first, second


def _setting(score: Score, name: str) -> str:
    """A known setting as printed, empty where the score does not tell."""
    return next((flat(score.settings[key]) for key in KNOWN[name] if key in score.settings), "")


def prompt_of(run: Run, task: str) -> str:
    """The prompt template that all predictions of a task share, the question put back as a placeholder."""
    prompts = {template_of(p) for p in run.predictions if p.task == task}
    # The least of a set, not the first: the same report every time.
    if len(prompts) > 1:
        return f"differs by sample, e.g. {min(prompts)}"
    return next(iter(prompts), "")


def template_of(prediction: Prediction) -> str:
    """A prompt with the question put back as a placeholder."""
    question = prediction.question
    return prediction.prompt.replace(question, "{question}") if question else prediction.prompt


def model_of(run: Run) -> str:
    """Role and fingerprint of the models an eval run was made from."""
    parents = run.manifest.get("parents") or []
    return ", ".join(f"{p.get('role', 'model')} {short(str(p.get('fingerprint', '')))}" for p in parents)


def short(fingerprint: str) -> str:
    """Enough of a fingerprint to tell models apart by eye; the lineage section has the whole."""
    return fingerprint if len(fingerprint) <= 16 else fingerprint[:12] + "…"


def flat(value: Any) -> str:
    """A setting on one line: ``a=1, b=true`` for objects, items joined by commas for lists."""
    if value is None:
        return ""
    # As YAML spells it; str would give Python's capital.
    if isinstance(value, bool):
        return "true" if value else "false"
    # Brackets and quotes of Python would be noise in a table's cell.
    if isinstance(value, dict):
        return ", ".join(f"{key}={flat(item) or 'none'}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(flat(item) or "none" for item in value)
    return str(value)


def _lines(by_system: dict[str, dict[str, str]]) -> list[Condition]:
    """Merge equal values; a system that lacks a setting others have is said to have none recorded."""
    names = list(dict.fromkeys(name for settings in by_system.values() for name in settings))
    # dict.fromkeys keeps the order of the first system; a known name that only a later one has must not end up last.
    order = {name: i for i, name in enumerate([*KNOWN, "n", "Model"])}
    names.sort(key=lambda name: order.get(name, len(order)))
    lines = []
    for name in names:
        values: dict[str, list[str]] = {}
        for system, settings in by_system.items():
            values.setdefault(settings.get(name, "not recorded"), []).append(system)
        shared = len(values) == 1
        lines += [Condition(name, value, [] if shared else systems) for value, systems in values.items()]
    return lines
