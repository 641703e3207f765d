"""Everything the report says, as plain data: what the three templates and the JSON file are made from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mmkit.eval.report.collect import Collection
from mmkit.eval.report.conditions import conditions, flat
from mmkit.eval.report.curves import Panel, panels_of
from mmkit.eval.report.differences import Difference, differences, sign_patterns
from mmkit.eval.report.gallery import Gallery, build_gallery
from mmkit.eval.report.lineage import Lineage, build_lineage
from mmkit.eval.report.lmms_eval_files import PROGRAM
from mmkit.eval.report.pictures import UNLOGGED, Picture
from mmkit.eval.report.runs import Run, Score
from mmkit.eval.report.systems import Condition, Row, system_rows
from mmkit.eval.report.tables import Column, Table, apart_lines, score_tables, task_columns
from mmkit.eval.report.viewer import Viewer, build_viewer

PART_FIGURES = ("points", "f1", "accuracy")  # of MME's subtasks, of POPE's splits, of all else
SKIPPED_LISTED = 50  # skipped samples named one by one for each run; skipped.jsonl has all
REASONS = 8  # distinct reasons listed per run; the JSON has all
NAMED = 8  # systems or tasks named one by one in the first sentence
MISSING_LISTED = 20  # pictures named one by one; the JSON has all


@dataclass(frozen=True)
class Skipped:
    """Samples a run left out, by reason, most frequent first; `total` is what its manifest counts.

    `samples` are the first `SKIPPED_LISTED` of them: source, key, reason.
    """

    run: str
    total: int
    reasons: list[tuple[str, int]]
    samples: list[tuple[str, str, str]]

    @property
    def listed(self) -> int:
        """How many samples the reasons account for."""
        return sum(count for _, count in self.reasons)


@dataclass(frozen=True)
class DataUse:
    """What a run read: fingerprint, how many samples the data has, and further facts of its manifest."""

    run: str
    fingerprint: str
    samples: int | None
    facts: str


@dataclass(frozen=True)
class Shapes:
    """How a system's answers to one task looked: counts of the wrong shapes, and what the score says of them."""

    system: str
    task: str
    total: int
    counts: dict[str, int]
    notes: list[str]


@dataclass(frozen=True)
class Parts:
    """Figures of one task by question type or the like: name, samples, and a printed figure per system."""

    task: str
    kind: str
    heading: str
    systems: list[str]
    rows: list[tuple[str, int, list[str]]]


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
    patterns: int
    not_compared: list[str]
    conditions: dict[str, list[Condition]]
    probe_rows: list[Row]
    probes: list[Table]
    probe_conditions: dict[str, list[Condition]]
    panels: list[Panel]
    gallery: Gallery
    viewer: Viewer
    shapes: list[Shapes]
    parts: list[Parts]
    data: list[DataUse]
    skipped: list[Skipped]
    notes: list[str]
    runs: list[Run]
    lineage: Lineage

    @property
    def apart(self) -> list[str]:
        """Figures that do not compare with the first of their column, in words."""
        return apart_lines(self.tables)

    @property
    def probe_apart(self) -> list[str]:
        """The same of the probes."""
        return apart_lines(self.probes)

    @property
    def unlike(self) -> list[str]:
        """Tested pairs that were asked otherwise, in words."""
        told = "the difference may be that of the conditions"
        return [f"{d.system}, {d.column.task}: {'; '.join(d.unlike)}: {told}" for d in self.differences if d.unlike]

    @property
    def interval(self) -> str:
        """What the intervals of the score table are."""
        errors = "; of imported figures 1.96 standard errors" if any(run.imported for run in self.runs) else ""
        return f"95 % bootstrap interval{errors}"

    @property
    def rules(self) -> list[str]:
        """Tasks that are scored by several rules here, and how an import's rule can be had for mmkit's own answers."""
        return rule_lines(self.rows)

    @property
    def sources(self) -> list[tuple[str, str, str, str, str]]:
        """Every published figure in words: system, task and metric, figure, source, conditions."""
        lines = []
        for table in self.tables:
            cells = [(label, c, cell) for label, line in table.references for c, cell in line if cell.key]
            for label, c, cell in cells:
                told = dict(cell.conditions)
                lines.append((label, f"{c.task}, {c.heading} {c.unit}", cell.text, told["Source"], told["Conditions"]))
        return list(dict.fromkeys(lines))

    @property
    def missing_pictures(self) -> list[Picture]:
        """Pictures that could not be shown, each once; an import, which has none, is a note instead."""
        found = [*self.gallery.missing(), *(p for p in self.viewer.pictures if p.missing)]
        return list({p.name: p for p in found if p.missing != UNLOGGED}.values())


def assemble(collection: Collection, *, title: str, gallery: int, thumbnail: int, seed: int) -> Report:
    """Compute the report's content from the runs.

    Args:
        collection: The runs and their ancestors.
        title: Heading of the page.
        gallery: How many pictures to show.
        thumbnail: Longest side of the gallery's thumbnails, px.
        seed: Seed of the gallery's draw and of the bootstrap.

    Returns:
        The report.
    """
    # Apart from the probes: those score an encoder, evaluations a whole model, and one table would mix the two.
    rows = system_rows([run for run in collection.runs if run.kind == "eval"])
    probes = system_rows([run for run in collection.runs if run.kind == "probe" or (run.kind == "train" and run.scores)])
    found, without = differences(rows, seed=seed) if rows else ([], [])
    # No star where it may be the prompt that made the difference: the verdict below says both.
    marks = {(d.system, d.column): "*" for d in found if d.significant and not d.unlike}
    everything = collection.everything()
    pictures = build_gallery(rows, count=gallery, seed=seed)
    return Report(
        title=title,
        seed=seed,
        summary=summary_of(rows, probes, everything),
        facts=facts_of(collection),
        rows=rows,
        tables=score_tables(rows, marks),
        differences=found,
        patterns=sign_patterns(rows) if rows else 0,
        not_compared=without,
        conditions=conditions(rows),
        probe_rows=probes,
        probes=score_tables(probes, key="probe"),
        probe_conditions=conditions(probes),
        panels=panels_of(collection, rows),
        gallery=pictures,
        viewer=build_viewer(pictures, thumbnail=thumbnail),
        shapes=[shapes_of(row.label, task, score) for row in rows for task, score in row.scores.items()],
        parts=parts_of(rows),
        data=[use for run in everything if (use := data_of(run)) is not None],
        # Of all runs: what an encoder's training left out is a condition of every score built on it.
        skipped=[skipped_of(run) for run in everything],
        notes=[*collection.notes, *(f"{run.name}: {note}" for run in everything for note in notes_of(run))],
        runs=everything,
        lineage=build_lineage(everything),
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
    return f"{_named(systems, 'systems')}{verb} on {_named(tasks, 'tasks')}, from {_listed(counts)}."


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


def shapes_of(system: str, task: str, score: Score) -> Shapes:
    """Counts of answers with the wrong shape; captions have none."""
    counts = {kind: count for kind, count in score.answers.items() if kind != "total"}
    return Shapes(system, task, score.answers.get("total", score.n), counts, score.notes)


def notes_of(run: Run) -> list[str]:
    """What reading the run found, and that an import's samples have no pictures."""
    said = (
        f"its samples are shown without pictures, which {run.imported} did not log; in tests each counts as a picture of its own"
    )
    if run.kind == "eval" and run.scores and not run.predictions and not run.imported:
        return [*run.notes, "it has no predictions.jsonl, so that its answers are not in the gallery"]
    bare = run.imported and run.predictions and all(p.image.startswith(f"{PROGRAM}/{p.id}") for p in run.predictions)
    return [*run.notes, said] if bare else run.notes


def parts_of(rows: Sequence[Row]) -> list[Parts]:
    """The breakdowns of all tasks, systems side by side."""
    found: dict[tuple[str, str], dict[str, dict[str, dict[str, float]]]] = {}
    for row in rows:
        for task, score in row.scores.items():
            for kind, figures in score.breakdown.items():
                found.setdefault((task, kind), {})[row.label] = figures
    tables = []
    for (task, kind), systems in found.items():
        every = [figures for parts in systems.values() for figures in parts.values()]
        # Suites give counts along; the figure is the one that their papers print by part.
        column = Column(task, next((name for name in PART_FIGURES if any(name in figures for figures in every)), "accuracy"))
        lines = []
        for name in dict.fromkeys(name for parts in systems.values() for name in parts):
            here = [parts.get(name, {}) for parts in systems.values()]
            counts = [int(figures["n"]) for figures in here if "n" in figures]
            shown = [column.show(figures.get(column.metric)) for figures in here]
            lines.append((name, max(counts, default=0), shown))
        heading = f"{column.heading} {column.unit}".strip()
        tables.append(Parts(task, kind.replace("_", " "), heading, list(systems), lines))
    return tables


def rule_lines(rows: Sequence[Row]) -> list[str]:
    """A line for each task under several rules: why it has several columns, and how to bring an import beside a run."""
    lines = []
    for task, columns in task_columns(rows):
        rules = list(dict.fromkeys(value for c in columns for name, value in c.variant if name == "Rule"))
        if len(rules) < 2:
            continue
        line = f"{task}: one and the same answer may be right under one of these rules and wrong under another, so that each "
        line += f"has columns of its own: {'; '.join(rules)}"
        imported = {
            str(row.scores[task].settings.get("rule")) for row in rows if task in row.scores and row.run_of(task).imported
        }
        # A rule with the program's name in front is one that mmkit does not have.
        own = sorted(rule for rule in imported & set(rules) if not rule.startswith(PROGRAM))
        lines.append(line + "".join(f". For {PROGRAM}'s rule evaluate with settings.rule={rule}" for rule in own))
    return lines


def data_of(run: Run) -> DataUse | None:
    """The data a run's manifest names, None where it names none."""
    data = run.manifest.get("data") or {}
    if not isinstance(data, dict) or not data.get("fingerprint"):
        return None
    samples = run.manifest.get("samples_in_data")
    facts = flat({key: value for key, value in data.items() if key != "fingerprint"})
    return DataUse(run.name, str(data["fingerprint"]), samples if isinstance(samples, int) else None, facts)


def skipped_of(run: Run) -> Skipped:
    """Count a run's left-out samples by reason."""
    reasons = Counter(str(row.get("reason", "no reason given")) for row in run.skipped)
    # The manifest's count holds even where a kill cut the list short.
    total = int(run.manifest.get("skipped") or len(run.skipped))
    samples = [(_text(row, "source"), _text(row, "key"), _text(row, "reason")) for row in run.skipped[:SKIPPED_LISTED]]
    return Skipped(run.name, total, reasons.most_common(), samples)


def _text(row: dict[str, Any], key: str) -> str:
    return str(row.get(key) or "")


def duration(seconds: float) -> str:
    """Hours, minutes or seconds, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _distinct(values: Iterable[Any]) -> list[str]:
    """In order of first mention, empty ones left out."""
    return list(dict.fromkeys(str(v) for v in values if v)) or ["not recorded"]


def _named(names: Sequence[str], what: str) -> str:
    """The names; of many their number and the first few, for the tables below have them all."""
    if len(names) <= NAMED:
        return _listed(names)
    return f"{len(names)} {what} ({', '.join(names[:3])}, …)"


def _listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "nothing"
