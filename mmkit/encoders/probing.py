"""``mmkit probe``: how much a frozen encoder knows, by a linear probe and k-NN on labelled pictures."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkit.config import ProbeDataConfig, ProbeRecipe
from mmkit.data.images import ImageRef, decode_image, fit_square
from mmkit.data.pairs import safe_image_path
from mmkit.data.skipped import LeftOut, SampleError
from mmkit.encoders.features import FeatureCache, extract_features
from mmkit.encoders.probe import ProbeResult, knn, linear_probe
from mmkit.encoders.save import load_encoder
from mmkit.encoders.vit import VisionEncoder
from mmkit.errors import InputError
from mmkit.eval.statistics import mean_ci
from mmkit.files import hash_text, write_json
from mmkit.run import Run, one_process, resolve_parent

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
_BATCH = 64


class LabelledSet(NamedTuple):
    """Files with their class names."""

    images: list[Path]
    labels: list[str]


def run_probe(recipe: ProbeRecipe, *, restart: bool = False) -> Run:
    """Extract features once, run the probes, write scores.json.

    Raises:
        InputError: No labelled pictures, an unreadable one, or a test class that training does not have.
    """
    run = Run(Path(recipe.run))
    parent = resolve_parent("encoder", recipe.encoder)
    one_process("probe")
    state = run.state(recipe, [parent], restart=restart)
    if state == "done":
        return run
    train, test = (read_labelled(path, recipe.data) for path in (recipe.data.train, recipe.data.test))
    classes = sorted(set(train.labels))
    unknown = sorted(set(test.labels) - set(classes))
    if unknown:
        raise InputError(
            f"classes {', '.join(unknown[:5])} are not in the training set", where=recipe.data.test, mend="fix labels"
        )
    encoder = load_encoder(parent.folder or recipe.encoder)
    data = hash_text(*(str(p) + label for part in (train, test) for p, label in zip(*part, strict=True)))
    run.start(recipe, [parent], state="new" if state == "continue" else state, data_fingerprint=data, kind="probe")
    cache = FeatureCache(Path(recipe.run).parent / ".features")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sets = []
    for part in (train, test):
        times = (str(p.stat().st_mtime_ns) if p.exists() else "missing" for p in part.images)
        key = hash_text(parent.fingerprint, *map(str, part.images), *times)
        batches = _pixel_batches(part.images, encoder, recipe.data.max_pixels, run)
        features = cache.get(key, lambda batches=batches: extract_features(encoder, batches, device=device))  # type: ignore[misc]
        sets.append((features, torch.tensor([classes.index(label) for label in part.labels])))
    results = _probe(recipe, sets, len(classes))
    write_json(
        run.path / "scores.json", {"tasks": {n: _score(n, r, test, recipe, parent.fingerprint) for n, r in results.items()}}
    )
    run.finish("done")
    return run


def read_labelled(location: str, data: ProbeDataConfig) -> LabelledSet:
    """Labelled pictures: an image folder with a sub-folder a class, or JSONL rows with ``image`` and the label key.

    Rows whose label is null are left away: they have no class.

    Raises:
        InputError: Nothing there, a bad row, or a picture outside the data folder.
    """
    path = Path(location)
    if path.is_dir():
        files = sorted(p for p in path.glob("*/*") if p.suffix.lower() in _SUFFIXES)
        labels = [p.parent.name for p in files]
    elif path.is_file():
        root = Path(data.image_root) if data.image_root else path.parent
        files, labels = [], []
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if row[data.label] is not None:
                    files.append(safe_image_path(root, row.get("image")))
                    labels.append(str(row[data.label]))
            except (ValueError, KeyError, TypeError) as error:
                mend = f"each row needs image and {data.label!r}"
                raise InputError(f"bad row ({error})", where=f"{path}:{number}", mend=mend) from None
    else:
        raise InputError("no such file or folder", where=location, mend="check data.train and data.test")
    if not files:
        raise InputError("no labelled picture", where=location, mend="give an image folder or JSONL rows with image and label")
    if data.limit is not None and data.limit < len(files):
        # Image folders come sorted by class: the first N would be one class.
        kept = sorted(random.Random(0).sample(range(len(files)), data.limit))
        files, labels = [files[i] for i in kept], [labels[i] for i in kept]
    return LabelledSet(files, labels)


def _pixel_batches(images: list[Path], encoder: VisionEncoder, max_pixels: int, run: Run) -> Iterator[Tensor]:
    """uint8 ``[B, 3, S, S]``; an unreadable picture stops the probe, because a score over other pictures is another score."""
    for start in range(0, len(images), _BATCH):
        batch = []
        for path in images[start : start + _BATCH]:
            try:
                image = decode_image(ImageRef(str(path)).read(), max_pixels=max_pixels)
            except SampleError as error:
                run.skip([LeftOut(str(path), path.name, str(error))])
                raise InputError(str(error), where=path, mend="repair the picture or remove it from the set") from None
            batch.append(torch.from_numpy(fit_square(image, encoder.image_size, fit="crop")))
        yield torch.stack(batch)


def _probe(recipe: ProbeRecipe, sets: list[tuple[Tensor, Tensor]], num_classes: int) -> dict[str, ProbeResult]:
    """The probes that the recipe asks for."""
    (train_x, train_y), (test_x, test_y) = sets
    found = {}
    if "linear" in recipe.probes:
        found["linear-probe"] = linear_probe(
            train_x,
            train_y,
            test_x,
            test_y,
            num_classes=num_classes,
            lrs=recipe.lrs,
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
        )
    if "knn" in recipe.probes:
        found["knn"] = knn(train_x, train_y, test_x, test_y, k=recipe.k, temperature=recipe.temperature)
    return found


def _score(name: str, result: ProbeResult, test: LabelledSet, recipe: ProbeRecipe, fingerprint: str) -> dict[str, Any]:
    """A probe's result in the layout of every other score."""
    correct = [float(c) for c in result.correct]
    return {
        "task": name,
        "metrics": {"accuracy": result.accuracy},
        "ci95": {"accuracy": list(mean_ci(correct, seed=recipe.seed))},
        "n": len(correct),
        "settings": {**result.settings, "label": recipe.data.label, "encoder": recipe.encoder, "model_fingerprint": fingerprint},
        "per_sample": [{"id": str(p), "accuracy": c} for p, c in zip(test.images, correct, strict=True)],
    }
