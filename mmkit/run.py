"""Run directory: recipe, manifest, metrics, left-out samples, lineage (DESIGN section 5).

The same command on the same directory returns at once when the run is done, goes on when it was interrupted, and is refused
with a diff when the recipe or a parent changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Literal

import mmkit
from mmkit.config import EvalRecipe, PretrainRecipe, Recipe, dump_recipe
from mmkit.config.changes import changes
from mmkit.data.scan.crew import cores
from mmkit.data.skipped import LeftOut
from mmkit.errors import InputError
from mmkit.files import Writing, hash_file, hash_folder, read_json, write_json, write_text
from mmkit.lock import NAME as LOCK
from mmkit.lock import FolderLock

State = Literal["new", "continue", "done"]
# What a kill leaves of a file or folder that was being written beside its place: .NAME.xxxxxxxx.
_LEFTOVERS = tuple(
    f".{name}."
    for name in (
        "recipe.yaml",
        "manifest.json",
        "metrics.jsonl",
        "samples.jsonl",
        "nonfinite.json",
        "model",
        "scores.json",
        "predictions.jsonl",
    )
)
# Those that can change a number; listed, so that a manifest stays short and two of them can be compared.
_PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "tokenizers",
    "timm",
    "peft",
    "accelerate",
    "deepspeed",
    "open_clip_torch",
    "numpy",
    "pillow",
)


@dataclasses.dataclass(frozen=True)
class Parent:
    """What a run was made from.

    Attributes:
        role: ``encoder``, ``model`` or ``llm``.
        path: Run directory, model folder or hub name, as the recipe gave it.
        fingerprint: Hash of its weights and settings, or the name itself for a hub model.
        folder: Where the files lie; None for a hub name.
        system: Row label of the run that made it; of what no run made the hub name, or the folder's.
    """

    role: str
    path: str
    fingerprint: str
    folder: Path | None = None
    # A label says nothing about what is in it.
    system: str | None = dataclasses.field(default=None, compare=False)


def resolve_parent(role: str, name: str) -> Parent:
    """A run, a model folder, or a name such as ``timm:vit_base_patch16_224``.

    Raises:
        InputError: The run is not finished, or nothing is there.
    """
    path = Path(name)
    if (path / "manifest.json").is_file():
        manifest = read_json(path / "manifest.json")
        # Its model folder may be there all the same, from a run killed while it wrote its manifest.
        if manifest.get("status") != "done":
            raise InputError(
                f"this {role} run is not finished (status {manifest.get('status')!r})",
                where=path,
                mend="run its command again, it goes on from the last checkpoint",
            )
        if not (path / "model").is_dir():
            raise InputError(f"this run has no model to use as {role}", where=path, mend="give a training run")
        # The fingerprint from when it was written: a run that is used often is not hashed each time.
        return Parent(role, name, manifest["product"], path / "model", manifest.get("system") or path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"no {role} here: config.json is missing", where=path, mend="give a run or a model folder")
        # A folder that mmkit did not make has no record of itself, so its content is read.
        return Parent(role, name, hash_folder(path), path, path.name)
    # Language models go by plain hub names (gpt2); an encoder needs a prefix, or every typing error would be one.
    if ":" in name or role == "llm":
        return Parent(role, name, fingerprint_of_name(name), system=name)
    raise InputError(f"no such {role}", where=name, mend="give a finished run, a model folder, or timm:NAME")


def fingerprint_of_name(name: str) -> str:
    """Hash of the folder or file that a name such as ``hf:FOLDER`` or ``open_clip:MODEL:FILE`` ends in; a hub name itself."""
    place = Path(name.rpartition(":")[2])
    if place.is_dir():
        return hash_folder(place)
    return hash_file(place) if place.is_file() else name


class Run:
    """One run directory. Only the main process writes; the others hold a Run with ``write=False``."""

    def __init__(self, path: Path, *, write: bool = True) -> None:
        self.path = path
        self.write = write
        # Not the wall clock, which may be set back while a run lasts for days.
        self._started = time.monotonic()
        self._seconds_before = 0.0
        # (source, key) to the number of samples it stands for.
        self._skipped: dict[tuple[str, str], int] = {}
        self.manifest: dict[str, Any] = {}
        self._lock = FolderLock(path)

    @property
    def model(self) -> Path:
        """Where the product lies."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoints"

    def state(self, recipe: Recipe, parents: list[Parent], *, restart: bool = False) -> State:
        """Whether to start, to go on, or to return at once. Reads only.

        What only says how the work is done (:mod:`mmkit.config.changes`) may change between starts. A finished evaluation
        whose scoring changed goes on too: from its answers.

        Raises:
            InputError: The folder holds another recipe, other parents, or no run at all.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError("is a file, not a run directory", where=self.path, mend="choose another run=DIR")
        # An empty folder counts as new: a scheduler's script may have made it for its log, or a kill left it so.
        if not self.path.exists() or all(_is_leftover(path) for path in self.path.iterdir()):
            return "new"
        # Before `restart`: emptying a folder that mmkit did not make could cost the user everything in it.
        if not (self.path / "recipe.yaml").is_file():
            raise InputError("folder is not empty and no run", where=self.path, mend="choose another run=DIR")
        if restart:
            return "new"
        changed = changes((self.path / "recipe.yaml").read_text(encoding="utf-8"), dump_recipe(recipe))
        if others := [str(change) for change in changed if change.kind == "experiment"]:
            raise InputError(
                f"this run was made with another recipe ({'; '.join(others)})",
                where=self.path,
                mend="use another run=DIR, or --restart",
            )
        # Killed between the two writes of start: nothing has been trained yet.
        if not (self.path / "manifest.json").is_file():
            return "new"
        manifest = read_json(self.path / "manifest.json")
        # Strict: equal recipes have equal parents, so another number is a bug and not the user's doing.
        for old, new in zip(manifest["parents"], parents, strict=True):
            if old["fingerprint"] != new.fingerprint:
                raise InputError(
                    f"its {new.role} {new.path} has changed since ({old['fingerprint'][:8]} -> {new.fingerprint[:8]})",
                    where=self.path,
                    mend="use another run=DIR, or --restart",
                )
        # The answers are there, and are scored again by the new rule.
        if any(change.kind == "scoring" for change in changed):
            return "continue"
        return "done" if manifest["status"] == "done" else "continue"

    @property
    def finished(self) -> bool:
        """Whether what is on disk is a finished run; asked of the disk, not of this process."""
        path = self.path / "manifest.json"
        return path.is_file() and read_json(path)["status"] == "done"

    def start(
        self,
        recipe: Recipe,
        parents: list[Parent],
        *,
        state: State,
        data_fingerprint: str,
        kind: str,
        readings: dict[str, str] | None = None,
    ) -> None:
        """Make the folder (emptied when new), write recipe and manifest, load what an earlier start logged.

        Args:
            recipe: As it runs.
            parents: What the run is made from.
            state: From :meth:`state`.
            data_fingerprint: Hash of the data.
            kind: ``train``, ``eval`` or ``probe``.
            readings: Fingerprints of what the data are read with, such as their labels.

        Raises:
            InputError: The run goes on, but with other data or readings; or another process is at work in the folder.
        """
        data = {"fingerprint": data_fingerprint, **(readings or {})}
        starts: list[dict[str, Any]] = []
        if state == "continue":
            # On every process, before the first one writes: the limit on left-out samples must be the same for all.
            before = read_json(self.path / "manifest.json")
            # Order is a function of the data's size and position; over other data the rest of the run would be another run.
            if changed := sorted(key for key in data if before["data"].get(key) != data[key]):
                what = ", ".join("data" if key == "fingerprint" else key for key in changed)
                raise InputError(
                    f"the {what} have changed since this run began", where=self.path, mend="use another run=DIR, or --restart"
                )
            self._seconds_before = before.get("seconds", 0.0)
            starts = before.get("starts", [])
            listed = read_jsonl(self.path / "skipped.jsonl")
            self._skipped.update(((row["source"], row["key"]), row.get("samples", 1)) for row in listed)
        if not self.write:
            return
        self.lock()
        self._clear(everything=state == "new")
        if self.finished:
            # A kill after the next line must not leave the new recipe beside what an old one made and calls done.
            write_json(self.path / "manifest.json", {**before, "status": "running"})
        # The recipe first: it marks the folder as a run, which a restart after a kill here relies on.
        write_text(self.path / "recipe.yaml", dump_recipe(recipe))
        # UTC: the nodes of a cluster need not agree on a time zone.
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.manifest = {
            "status": "running",
            "kind": kind,
            "stage": recipe.stage,
            "system": system_of(recipe, parents),
            "mmkit": mmkit.__version__,
            "git": git_commit(),
            "packages": package_versions(),
            "hardware": hardware(),
            "parents": [{"role": p.role, "path": p.path, "fingerprint": p.fingerprint} for p in parents],
            "data": data,
            "started": now,
            # All of them: what an earlier version of mmkit made of a run stays part of it.
            "starts": [*starts, {"started": now, "mmkit": mmkit.__version__, "git": git_commit()}],
            "seconds": self._seconds_before,
            "skipped": self.skipped,
        }
        write_json(self.path / "manifest.json", self.manifest)

    def lock(self) -> None:
        """Keep other processes out of the folder until the run is finished or the process ends; on the main process only.

        Raises:
            InputError: Another process is at work there, or nothing can be written.
        """
        if self.write:
            self._lock.take()

    def unlock(self) -> None:
        """Let others in; a folder in which nothing but the lock was made goes again."""
        try:
            if self.write and self.path.is_dir() and [path.name for path in self.path.iterdir()] == [LOCK]:
                # While it is held: a deleted file that another process has just locked would keep nobody out.
                (self.path / LOCK).unlink()
                # Somebody may have made a new lock in it already.
                with contextlib.suppress(OSError):
                    self.path.rmdir()
        finally:
            self._lock.give_back()

    def _clear(self, *, everything: bool) -> None:
        """Empty the folder but for its lock, or remove only what a kill left half-written. Only ever a run's folder."""
        found = [p for p in self.path.iterdir() if p.name != LOCK and (everything or _is_leftover(p))]
        # The manifest first and the recipe last: whenever a kill comes, what is left is a run that has not begun.
        order = {"manifest.json": 0, "recipe.yaml": 2}
        for path in sorted(found, key=lambda p: order.get(p.name, 1)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def note(self, **fields: Any) -> None:
        """Add fields to the manifest (parameter counts, world size, ...)."""
        self.manifest.update(fields)
        self._write_manifest()

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl; floats are written with nine significant digits, which is all of fp32."""
        if self.write:
            # Nine digits give any fp32 back exactly; more would be digits of the conversion.
            short = {k: float(f"{v:.9g}") if isinstance(v, float) else v for k, v in row.items()}
            append_jsonl(self.path / "metrics.jsonl", [short])

    def show(self, rows: list[dict[str, Any]]) -> None:
        """Append rows to samples.jsonl: what a model wrote while it was trained."""
        if self.write and rows:
            append_jsonl(self.path / "samples.jsonl", rows)

    def record(self, name: str, value: Any) -> None:
        """Write a JSON file of its own beside the manifest."""
        if self.write:
            write_json(self.path / name, value)

    def drop_metrics_after(self, step: int) -> None:
        """Forget rows past the checkpoint that the run goes on from, so that no step is logged twice."""
        for path in (self.path / "metrics.jsonl", self.path / "samples.jsonl"):
            if self.write and path.exists():
                # The loop logs oftener than it saves, so a killed run has rows that are about to be made again.
                kept = [row for row in read_jsonl(path) if row["step"] <= step]
                write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def skip(self, samples: list[LeftOut]) -> None:
        """List samples that were left out, each once."""
        new = []
        for sample in samples:
            # By sample and not by event: one bad picture comes up in each epoch and must not add up to the limit.
            if (sample.source, sample.key) not in self._skipped:
                self._skipped[sample.source, sample.key] = sample.samples
                new.append(sample)
        # What is above is kept on every rank, written or not: all must reach the limit at the same step.
        if self.write and new:
            append_jsonl(self.path / "skipped.jsonl", [sample.row() for sample in new])

    def forget_skipped(self) -> None:
        """Begin the list anew, where a run that goes on tries again what it left out before."""
        self._skipped.clear()
        if self.write:
            (self.path / "skipped.jsonl").unlink(missing_ok=True)

    @property
    def skipped(self) -> int:
        """How many different samples were left out."""
        return sum(self._skipped.values())

    def finish(self, status: Literal["done", "stopped"], **fields: Any) -> None:
        """Write the final manifest; a done training run carries the fingerprint of its product."""
        if not self.write:
            return
        if status == "done":
            # Evaluation runs have no model; nothing can be made from them.
            fields["product"] = hash_folder(self.model) if self.model.is_dir() else ""
        # The status last of all: "done" stands for a product that is complete on disk.
        self.manifest.update(fields, status=status)
        self._write_manifest()
        self.unlock()

    def _write_manifest(self) -> None:
        if self.write:
            # Over all starts, so that the time of an interrupted run is comparable.
            self.manifest["seconds"] = round(self._seconds_before + time.monotonic() - self._started, 1)
            self.manifest["skipped"] = self.skipped
            write_json(self.path / "manifest.json", self.manifest)


def system_of(recipe: Recipe, parents: list[Parent]) -> str | None:
    """Row label of a run in the report: its recipe's, else that of the encoder or model that it is made from.

    A label that stood in the recipe of a task would name the wrong model as soon as another one is given.
    """
    # Language models are shared by the systems that a report compares.
    inherited = next((parent.system for parent in parents if parent.role != "llm"), None)
    # Pretraining makes an encoder of its own, whatever weights it began with.
    if recipe.system or inherited is None or isinstance(recipe, PretrainRecipe):
        return recipe.system
    return f"{inherited}, blind" if isinstance(recipe, EvalRecipe) and recipe.blind else inherited


def _is_leftover(path: Path) -> bool:
    """Whether a file or folder is the lock, or half of something that a kill cut off."""
    return path.name == LOCK or path.name.startswith(_LEFTOVERS)


def one_process(command: str, *, mend: str = "start it without torchrun or deepspeed") -> None:
    """Refuse a launcher with several processes where one does the work: all of them would write the same files.

    Raises:
        InputError: The launcher started more than one process.
    """
    # Set by torchrun and deepspeed alike; torch.distributed would have to be initialised to be asked.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"`mmkit {command}` runs in one process", where="WORLD_SIZE", mend=mend)


def append_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a JSON-lines file; a last line that a kill cut off is dropped first.

    Raises:
        InputError: The disk is full, read-only or broken.
    """
    with Writing(path):
        _append_jsonl(path, rows)


def _append_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """The work of :func:`append_jsonl`."""
    if path.exists() and path.stat().st_size:
        with path.open("r+b") as old:
            old.seek(-1, os.SEEK_END)
            # A half line that is written on would spoil the new row as well.
            if old.read() != b"\n":
                old.seek(0)
                # rfind gives -1 without any newline, and the file becomes empty.
                old.truncate(old.read().rfind(b"\n") + 1)
    # A lone surrogate (a file name that is not UTF-8) has no UTF-8 form, but \udcff inside a JSON string is legal.
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file that mmkit wrote; an absent file has none, a last line cut by a kill is dropped."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    # Only text before the final newline is whole: a killed writer leaves its last line without one.
    return [json.loads(line) for line in lines[:-1] if line]


def package_versions() -> dict[str, str]:
    """Versions of the packages that can change a number."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # Said, not left out: whether a package was there can change a number as well.
            found[name] = "absent"
    return found


# Once a process: the checkout may be edited while a run lasts, but not the code that it loaded.
@functools.cache
def git_commit() -> str | None:
    """Commit of the checkout that mmkit runs from, with ``+`` when it has changes; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    # An installed wheel may lie inside somebody else's repository, whose commit would say nothing.
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False).stdout.strip()

    # -uno below: run directories and notes beside the code are no change of it.
    commit = git("rev-parse", "--short=12", "HEAD")
    return (commit + ("+" if git("status", "--porcelain", "-uno") else "")) or None


@functools.cache
def hardware() -> dict[str, Any]:
    """Processor, cores and GPUs of this machine."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    # Often empty or just "x86_64" on Linux, hence the look into /proc.
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "cpu": model,
        # The cores this process may use: a scheduler or container gives fewer than the machine has.
        "cores": cores(),
        "gpus": gpus,
        "python": platform.python_version(),
        "system": platform.system(),
    }
