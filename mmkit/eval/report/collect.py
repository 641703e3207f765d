"""Reads run directories (DESIGN.md section 5) into dataclasses and follows their lineage to the training runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmkit.errors import InputError
from mmkit.eval.report.lmms_eval import read_lmms_eval
from mmkit.eval.report.lmms_eval_files import find_results, refuse_samples
from mmkit.eval.report.moved import follow, move_of
from mmkit.eval.report.runs import Prediction, Published, Run, Score
from mmkit.files import read_json

log = logging.getLogger(__name__)

__all__ = ["Collection", "Prediction", "Published", "Run", "Score", "collect", "find_parent", "read_run"]
KINDS = ("eval", "probe", "train")
PARTS = ("manifest.json", "scores.json", "predictions.jsonl", "recipe.yaml", "metrics.jsonl", "skipped.jsonl")


@dataclass(frozen=True)
class Collection:
    """The runs asked for, in the given order, and the ancestors found through their manifests (parents first).

    `notes` say what became of the paths that were given.
    """

    runs: list[Run]
    ancestors: list[Run]
    notes: list[str] = field(default_factory=list)

    def everything(self) -> list[Run]:
        """Ancestors first, then the runs asked for: the order in which they were made."""
        return [*self.ancestors, *self.runs]

    def descendants(self, run: Run) -> list[Run]:
        """The runs asked for that have `run` somewhere among their ancestors, in the given order."""
        return [other for other in self.runs if run.path in self.lineage(other)]

    def lineage(self, run: Run) -> set[Path]:
        """Paths of all ancestors of `run`, `run` itself left out."""
        by_path = {r.path: r for r in self.everything()}
        # Also ends a circle of parents, which an edited manifest can hold.
        seen: set[Path] = set()
        queue = list(run.parents)
        while queue:
            path = queue.pop()
            if path not in seen and path in by_path:
                seen.add(path)
                queue.extend(by_path[path].parents)
        # A circle leads back to the run itself.
        return seen - {run.path}


def collect(paths: Sequence[Path]) -> Collection:
    """Read the runs at `paths` and every training run they descend from.

    Args:
        paths: Run directories, and results files of lmms-eval or folders with them; one named twice counts once.

    Returns:
        The collection, names made distinct. Its notes are logged as warnings, too.

    Raises:
        InputError: No run is given, one is no run directory, is unfinished, or holds a damaged file.
    """
    notes: list[str] = []
    wanted = _wanted(paths, notes)
    if not wanted:
        raise InputError("no run directory given", where="report", mend="name at least one finished run, e.g. runs/eval")
    # A run is a folder; the one kind of file there is comes from another program.
    runs = {path: read_lmms_eval(path) if path.is_file() else read_run(path, need_done=True) for path in wanted}
    # Filled parents first, and that is the order in which the report lists them.
    ancestors: dict[Path, Run] = {}
    for run in list(runs.values()):
        _add_ancestors(run, runs, ancestors)
    notes += _remade([*ancestors.values(), *runs.values()])
    # Named last, because whether a folder's name is enough depends on the ancestors too.
    names = _distinct_names([*runs, *ancestors])
    for note in notes:
        log.warning("%s", note)
    return Collection(
        [replace(run, name=names[run.path]) for run in runs.values()],
        [replace(run, name=names[run.path]) for run in ancestors.values()],
        notes,
    )


def _wanted(paths: Sequence[Path], notes: list[str]) -> list[Path]:
    """The run directories and results files that are meant, each once; what was given twice is noted."""
    found: dict[Path, Path] = {}
    for given in paths:
        # Resolved first: a link and its target are one run.
        path = Path(given).resolve()
        if path.is_file():
            if path.name in PARTS and (path.parent / "manifest.json").is_file():
                raise InputError("is a file of a run, not a run", where=path, mend=f"give the run directory {path.parent}")
            refuse_samples(path)
        imported = find_results(path, notes) if path.is_dir() and not (path / "manifest.json").is_file() else []
        for one in imported or [path]:
            if one in found:
                same = f"{given} is given twice" if Path(given) == found[one] else f"{given} and {found[one]} are one run"
                notes.append(f"{same}; it counts once")
            found.setdefault(one, Path(given))
    return list(found)


def read_run(path: Path, *, need_done: bool) -> Run:
    """Read one run directory.

    Args:
        path: The directory.
        need_done: Refuse a run that has not finished (ancestors may have been stopped early and still be of use).

    Returns:
        The run.

    Raises:
        InputError: As told by `collect`.
    """
    manifest = _manifest(path, need_done=need_done)
    notes: list[str] = []
    kind = manifest["kind"]
    # Only runs that were asked for show scores and predictions; an eval run as an ancestor would be read for nothing.
    # A fine-tuned encoder is the one training run that has a score of its own.
    scored = need_done and (kind in ("eval", "probe") or (path / "scores.json").is_file())
    recipe = _recipe(path)
    return Run(
        path=path,
        name=path.name,
        kind=kind,
        stage=manifest.get("stage"),
        system=manifest.get("system"),
        manifest=manifest,
        recipe=recipe,
        metrics=list(_rows(path / "metrics.jsonl", notes)) if kind == "train" else [],
        skipped=list(_rows(path / "skipped.jsonl", notes)),
        scores=_scores(path / "scores.json", manifest.get("data")) if scored else {},
        predictions=_predictions(path / "predictions.jsonl") if scored and kind != "train" else [],
        # A parent from the hub or a plain folder is no run; the manifest shown in the lineage still names it.
        parents=[p for entry in manifest.get("parents") or [] if (p := find_parent(entry.get("path"), path))],
        notes=notes,
        move=move_of(path.resolve(), recipe),
    )


def _recipe(run: Path) -> str:
    """Text of a run's recipe, empty if absent. Shown, never parsed: a bad byte in a comment is no reason to refuse a report."""
    file = run / "recipe.yaml"
    return file.read_text("utf-8", errors="replace") if file.is_file() else ""


def find_parent(named: object, child: Path) -> Path | None:
    """The run directory a manifest's parent entry means, or None for a model from elsewhere (hub, plain folder).

    Args:
        named: The entry's path: a run directory, its ``model/`` or one of its ``checkpoints/``.
        child: The run whose manifest names it.

    Returns:
        The resolved run directory.
    """
    # A null, a number and an empty name all mean the same: no run to follow.
    if not isinstance(named, str) or not named:
        return None
    given = Path(named)
    # A relative path was written from the launch directory, which is most often a folder above the runs.
    bases = [given] if given.is_absolute() else [given, *(folder / given for folder in (child, *child.parents))]
    if (there := follow(named, move_of(child, _recipe(child)))) is not None:
        bases.append(there)
    for base in bases:
        folder = base
        # A recipe may name the run, its product or a checkpoint; all three lead to the run.
        if base.name == "model":
            folder = base.parent
        elif base.parent.name == "checkpoints":
            folder = base.parent.parent
        # Tried from the child upwards, a relative name can hit the child itself.
        if (folder / "manifest.json").is_file() and folder.resolve() != child:
            return folder.resolve()
    return None


def _add_ancestors(run: Run, runs: dict[Path, Run], ancestors: dict[Path, Run]) -> None:
    """Depth first, so that `ancestors` ends up with parents before children; `runs` are not listed twice."""
    stack: list[tuple[Run, Iterator[Path]]] = [(run, iter(run.parents))]
    seen: set[Path] = {run.path}
    while stack:
        current, parents = stack[-1]
        path = next(parents, None)
        if path is None:
            stack.pop()
            # A run that was asked for is walked through like any other, but the report has it already.
            if current.path not in runs:
                ancestors.setdefault(current.path, current)
        elif path not in seen and path not in ancestors:
            seen.add(path)
            parent = runs.get(path) or read_run(path, need_done=False)
            stack.append((parent, iter(parent.parents)))


def _remade(runs: Sequence[Run]) -> list[str]:
    """A line for each run whose parent has another fingerprint by now: what is shown of that parent is not what was used."""
    by_path = {run.path: run for run in runs}
    lines = []
    for run in runs:
        for entry in run.manifest.get("parents") or []:
            parent = by_path.get(find_parent(entry.get("path"), run.path) or Path())
            then, now = entry.get("fingerprint"), parent.manifest.get("product") if parent else None
            # A checkpoint or a model folder named by itself has a fingerprint of its own.
            if parent and Path(str(entry["path"])).name == parent.path.name and then and now and then != now:
                lines.append(
                    f"{run.path}: its {entry.get('role', 'parent')} {parent.path} was made anew since (fingerprint then {then}, "
                    f"now {now}), so that the lineage and the curves shown are not those of what was used"
                )
    return lines


def _distinct_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Folder names, with as many parent folders in front as it takes to tell them apart."""
    # Pipelines name folders by stage, so the last part alone (probe, eval-mllm) is often the same for every system.
    names: dict[Path, str] = {}
    for path in paths:
        for depth in range(1, len(path.parts) + 1):
            tail = path.parts[-depth:]
            if all(other == path or other.parts[-depth:] != tail for other in paths):
                break
        names[path] = "/".join(tail)
    return names


def _manifest(path: Path, *, need_done: bool) -> dict[str, Any]:
    """The manifest, checked for the few keys the report cannot do without."""
    file = path / "manifest.json"
    if not file.is_file():
        found = "no such file or directory" if not path.is_dir() else "not a run directory (it has no manifest.json)"
        mend = "give the directory of a finished mmkit train, probe or eval run, or a results file of lmms-eval or its folder"
        inside = sorted(path.glob("*/manifest.json"))
        if inside:
            mend = f"name the runs in it: {' '.join(str(p.parent) for p in inside[:3])}{' …' if inside[3:] else ''}"
        raise InputError(found, where=path, mend=mend)
    manifest = read_json(file, mend="run the stage again with --restart")
    # Other programs write a manifest.json too.
    if not isinstance(manifest, dict) or manifest.get("kind") not in KINDS:
        kind = manifest.get("kind") if isinstance(manifest, dict) else None
        raise InputError(f"kind is {kind!r}, not one of {', '.join(KINDS)}", where=file, mend="run the stage again")
    status = manifest.get("status")
    # The figures of a running run could change after the report was made.
    if need_done and status != "done":
        # A killed run has no chance to say that it was.
        first = "wait for its end or, if it was killed, " if status == "running" else ""
        mend = f"{first}start the same command again to finish it, or leave it out of the report"
        raise InputError(f"the run is not done (status {status!r})", where=path, mend=mend)
    return manifest


def _rows(file: Path, notes: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file, none if absent; with `notes`, a last line cut by a kill is noted there instead of refused."""
    if not file.is_file():
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                where = f"{file}:{number}"
                # Only a killed writer leaves a line without its end; anything else is damage.
                if notes is not None and not line.endswith("\n"):
                    notes.append(f"{file.name}:{number}: last line cut in the middle, left out")
                    log.warning("%s: last line cut in the middle, left out", where)
                    return
                raise InputError(f"not valid JSON ({error})", where=where, mend="run the stage again") from error
            if not isinstance(row, dict):
                raise InputError("not a JSON object", where=f"{file}:{number}", mend="run the stage again")
            yield row


def _scores(file: Path, data: object) -> dict[str, Score]:
    """The tasks of a ``scores.json``, of a run on `data` as its manifest has it."""
    if not file.is_file():
        raise InputError("the run has no scores.json", where=file.parent, mend="run it again with --restart")
    tasks = read_json(file, mend="run it again with --restart")
    tasks = tasks.get("tasks") if isinstance(tasks, dict) else None
    if not isinstance(tasks, dict):
        raise InputError('no "tasks" object in it', where=file, mend="run the evaluation again")
    mark = data.get("fingerprint") if isinstance(data, dict) else None
    # One fingerprint for the files of all tasks: it tells two runs apart only where their tasks are the same.
    told = (str(mark), frozenset(tasks)) if mark else None
    return {name: replace(_score(name, entry, file), data=told) for name, entry in tasks.items()}


def _score(name: str, entry: dict[str, Any], file: Path) -> Score:
    """One SCORE object."""
    try:
        return Score(
            task=str(entry.get("task", name)),
            # A null or absent figure is left out and shows as a dash, never as 0.
            metrics={k: float(v) for k, v in entry["metrics"].items() if v is not None},
            ci95={k: (float(v[0]), float(v[1])) for k, v in (entry.get("ci95") or {}).items() if v is not None},
            n=int(entry.get("n", 0)),
            settings=dict(entry.get("settings") or {}),
            per_sample=list(entry.get("per_sample") or []),
            answers={k: int(v) for k, v in (entry.get("answers") or {}).items()},
            published=[_published(row) for row in entry.get("published") or []],
            breakdown=dict(entry.get("breakdown") or {}),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"task {name!r} is no score object ({type(error).__name__}: {error})"
        raise InputError(what, where=file, mend="run the evaluation again") from error


def _published(row: dict[str, Any]) -> Published:
    """A reference row, as a task's YAML has it."""
    metrics = {k: float(v) for k, v in row["metrics"].items() if v is not None}
    return Published(str(row["system"]), metrics, str(row.get("source") or ""), str(row.get("conditions") or ""))


def _predictions(file: Path) -> list[Prediction]:
    """All rows of a ``predictions.jsonl`` (probe runs have none)."""
    found = []
    # No notes here: a cut predictions file of a finished run is damage, while logs are appended to until a kill.
    for number, row in enumerate(_rows(file), 1):
        try:
            found.append(_prediction(row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"row {number} is no prediction ({type(error).__name__}: {error})"
            raise InputError(what, where=file, mend="run the evaluation again") from error
    return found


def _prediction(row: dict[str, Any]) -> Prediction:
    """One row, numbers as floats and the picture shown defaulting to the picture asked about."""
    image = str(row.get("image") or "")
    return Prediction(
        task=str(row["task"]),
        # As text, because per_sample's ids are compared with it, and COCO's are numbers while file names are not.
        id=str(row["id"]),
        image=image,
        image_shown=str(row.get("image_shown") or image),
        prompt=str(row.get("prompt") or ""),
        text=str(row["prediction"]),
        references=[str(r) for r in row.get("references") or []],
        question=row.get("question"),
        score={k: float(v) for k, v in (row.get("score") or {}).items() if isinstance(v, (int, float))},
        type=str(row.get("type") or ""),
        parsed=None if row.get("parsed") is None else str(row["parsed"]),
    )
