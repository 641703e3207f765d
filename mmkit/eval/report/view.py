"""Everything the report says, as plain data: what the three templates and the JSON file are made from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mmkit.eval.report.collect import Collection, Run
from mmkit.eval.report.conditions import conditions, flat
from mmkit.eval.report.gallery import Gallery, build_gallery
from mmkit.eval.report.plots import Curve, curves_svg
from mmkit.eval.report.tables import Condition, Difference, Row, Table, differences, score_tables, system_rows

REASONS = 8  # distinct reasons listed per run; the JSON has all


@dataclass(frozen=True)
class Panel:
    """Training curves of one stage, and the drawing of them."""

    title: str
    curves: list[Curve]
    svg: str


@dataclass(frozen=True)
class Skipped:
    """Samples a run left out, by reason, most frequent first; `total` is what its manifest counts."""

    run: str
    total: int
    reasons: list[tuple[str, int]]

    @property
    def listed(self) -> int:
        """How many samples the reasons account for."""
        return sum(count for _, count in self.reasons)


@dataclass(frozen=True)
class Report:
    """The whole report."""

    title: str
    seed: int
    summary: str
    facts: list[tuple[str, list[str]]]
    rows: list[Row]
    tables: list[Table]
    differences: list[Difference]
    not_compared: list[str]
    conditions: dict[str, list[Condition]]
    probe_rows: list[Row]
    probes: list[Table]
    probe_conditions: dict[str, list[Condition]]
    panels: list[Panel]
    gallery: Gallery
    skipped: list[Skipped]
    notes: list[str]
    runs: list[Run]


def assemble(collection: Collection, *, title: str, gallery: int, seed: int) -> Report:
    """Compute the report's content from the runs.

    Args:
        collection: The runs and their ancestors.
        title: Heading of the page.
        gallery: How many pictures to show.
        seed: Seed of the gallery's draw and of the bootstrap.

    Returns:
        The report.
    """
    # Apart from the probes: those score an encoder, evaluations a whole model, and one table would mix the two.
    rows = system_rows([run for run in collection.runs if run.kind == "eval"])
    probes = system_rows([run for run in collection.runs if run.kind == "probe" or (run.kind == "train" and run.scores)])
    found, without = differences(rows, seed=seed) if rows else ([], [])
    everything = collection.everything()
    return Report(
        title=title,
        seed=seed,
        summary=summary_of(rows, probes, everything),
        facts=facts_of(collection),
        rows=rows,
        tables=score_tables(rows),
        differences=found,
        not_compared=without,
        conditions=conditions(rows),
        probe_rows=probes,
        probes=score_tables(probes),
        probe_conditions=conditions(probes),
        panels=panels_of(collection, rows),
        gallery=build_gallery(rows, count=gallery, seed=seed),
        # Of all runs: what an encoder's training left out is a condition of every score built on it.
        skipped=[skipped_of(run) for run in everything],
        notes=[f"{run.name}: {note}" for run in everything for note in run.notes],
        runs=everything,
    )


def summary_of(rows: Sequence[Row], probes: Sequence[Row], runs: Sequence[Run]) -> str:
    """One sentence: which systems on which tasks, from how many runs."""
    systems = list(dict.fromkeys(row.label for row in [*rows, *probes]))
    tasks = list(dict.fromkeys(task for row in [*rows, *probes] for task in row.scores))
    kinds = Counter(run.kind for run in runs)
    names = {"eval": "evaluation", "probe": "probe", "train": "training"}
    # Ancestors count too: the page shows their curves and their left-out samples.
    counts = [f"{kinds[k]} {word} run{'s' if kinds[k] > 1 else ''}" for k, word in names.items() if kinds[k]]
    if not systems:
        return f"Training curves of {_listed(counts)}."
    verb = " are compared" if len(systems) > 1 else " is scored"
    return f"{_listed(systems)}{verb} on {_listed(tasks)}, from {_listed(counts)}."


def facts_of(collection: Collection) -> list[tuple[str, list[str]]]:
    """When, with which code and on which hardware; several values where the runs differ."""
    runs = collection.everything()
    started = sorted(str(r.manifest["started"]) for r in runs if r.manifest.get("started"))
    seconds = math.fsum(float(r.manifest.get("seconds") or 0) for r in runs)
    # A span, since the runs of one report may lie days apart.
    when = [] if not started else started[:1] if len(set(started)) == 1 else [f"{started[0]} to {started[-1]}"]
    # Absent packages are in the manifests; here they would bury the versions that count.
    packages = [{k: v for k, v in (r.manifest.get("packages") or {}).items() if v != "absent"} for r in runs]
    return [
        ("Runs started", when or ["not recorded"]),
        ("Time of all runs", [duration(seconds)]),
        ("mmkit", _distinct(r.manifest.get("mmkit") for r in runs)),
        ("Git commit", _distinct(r.manifest.get("git") or "not a checkout" for r in runs)),
        ("Hardware", _distinct(hardware_of(r.manifest.get("hardware")) for r in runs)),
        ("Packages", _distinct(", ".join(f"{k} {v}" for k, v in p.items()) for p in packages)),
    ]


def hardware_of(hardware: object) -> str:
    """The manifest's hardware on one line: processor and cores, GPUs counted by name, then the rest."""
    if not isinstance(hardware, dict):
        return flat(hardware)
    left = dict(hardware)
    cpu, cores, gpus = left.pop("cpu", None), left.pop("cores", None), left.pop("gpus", None)
    parts = [f"{cpu}, {cores} cores" if cores else str(cpu)] if cpu else []
    if isinstance(gpus, list):
        # An empty list was looked at and found empty, which is not the same as not recorded.
        parts += [f"{n} × {name}" for name, n in Counter(map(str, gpus)).items()] or ["no GPU"]
    elif gpus is not None:
        parts.append(flat(gpus))
    return "; ".join([*parts, *(f"{key} {flat(value)}" for key, value in left.items())])


def panels_of(collection: Collection, rows: Sequence[Row]) -> list[Panel]:
    """One panel per training stage, in the order the stages were run, systems overlaid.

    Two runs of one stage in a chain (align, then fine-tune) are two panels: ``llava``, ``llava, step 2``.
    """
    # Backwards, so that of two rows of one system the first gives the colour.
    styles = {row.runs[0].system or row.runs[0].name: i for i, row in reversed(list(enumerate(rows)))}
    by_path = {run.path: run for run in collection.everything()}
    stages: dict[tuple[int, str], list[Curve]] = {}
    for run in collection.everything():
        if run.kind == "train":
            lineage = [by_path[path] for path in collection.lineage(run)]
            step = 1 + sum(other.stage == run.stage for other in lineage)
            title = (run.stage or "training") + (f", step {step}" if step > 1 else "")
            # Counted along the lineage, not by start time: a later run of an early stage still belongs in front.
            depth = sum(other.kind == "train" for other in lineage)
            # An MLLM on a downloaded encoder has an ancestor fewer than one on an encoder that was pretrained here.
            stages.setdefault((depth, title), []).append(_curve(run, collection, styles))
    # The same stage at two depths is one panel, at the place of the first.
    merged: dict[str, list[Curve]] = {}
    for (_, title), curves in sorted(stages.items(), key=lambda item: item[0][0]):
        merged.setdefault(title, []).extend(curves)
    return [Panel(t, c, curves_svg(c, name=f"panel{i}")) for i, (t, c) in enumerate(merged.items())]


def skipped_of(run: Run) -> Skipped:
    """Count a run's left-out samples by reason."""
    reasons = Counter(str(row.get("reason", "no reason given")) for row in run.skipped)
    # The manifest's count holds even where a kill cut the list short.
    return Skipped(run.name, int(run.manifest.get("skipped") or len(run.skipped)), reasons.most_common())


def duration(seconds: float) -> str:
    """Hours, minutes or seconds, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _curve(run: Run, collection: Collection, styles: dict[str, int]) -> Curve:
    """A run's losses, labelled and coloured by the system it made; several systems may share an encoder."""
    made = list(dict.fromkeys(c.system or c.name for c in collection.descendants(run) if c.kind != "train"))
    label = run.system or ", ".join(made) or run.name
    # A run that no system of the table came from gets a colour of its own.
    style = next((styles[s] for s in [label, *made] if s in styles), len(styles))
    # Rows of metrics.jsonl hold a training loss, a validation loss, or both.
    train = [row for row in run.metrics if _number(row.get("loss"))]
    held_out = [row for row in run.metrics if _number(row.get("val_loss"))]
    return Curve(
        label=label,
        run=run.name,
        style=style,
        steps=[float(row.get("step", i)) for i, row in enumerate(train)],
        loss=[float(row["loss"]) for row in train],
        val_steps=[float(row.get("step", i)) for i, row in enumerate(held_out)],
        val_loss=[float(row["val_loss"]) for row in held_out],
    )


def _number(value: Any) -> bool:
    # JSON from Python may hold NaN and inf, which no axis can show.
    return isinstance(value, (int, float)) and math.isfinite(value)


def _distinct(values: Iterable[Any]) -> list[str]:
    """In order of first mention, empty ones left out."""
    return list(dict.fromkeys(str(v) for v in values if v)) or ["not recorded"]


def _listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "nothing"
