"""``mmkit probe``: how much a frozen encoder knows, by linear probe, k-shot, k-NN and zero-shot on labelled pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mmkit.config import ProbeRecipe
from mmkit.data.labelled import LabelledSource, open_labelled
from mmkit.encoders.features import FeatureCache, extract_features, pixel_batches
from mmkit.encoders.kshot import check_shots, kshot
from mmkit.encoders.probe import ProbeResult, knn, linear_probe
from mmkit.encoders.save import encoder_folder, load_encoder, load_tagger
from mmkit.encoders.templates import class_names, open_templates
from mmkit.encoders.vit import VisionEncoder
from mmkit.errors import InputError
from mmkit.eval.statistics import mean_ci
from mmkit.files import hash_text, write_json
from mmkit.run import Parent, Run, one_process, resolve_parent

if TYPE_CHECKING:
    from mmkit.encoders.head import SuperClassHead
    from mmkit.encoders.labels import CaptionLabels
    from mmkit.encoders.text import TextTower

# Recipe's name of a probe -> name of its task in scores.json.
TASKS = {"linear": "linear-probe", "kshot": "kshot", "knn": "knn", "zeroshot": "zeroshot", "tags": "tags"}
_BATCH = 64


@dataclasses.dataclass(frozen=True)
class _Sets:
    """What is probed: the sets, their classes in order, and what these are called."""

    train: LabelledSource | None
    test: LabelledSource
    classes: list[str]
    names: list[str]


def run_probe(recipe: ProbeRecipe, *, restart: bool = False) -> Run:
    """Extract features once, run the probes, write scores.json.

    Raises:
        InputError: No labelled pictures, an unreadable one, a test class that training does not have, or an encoder without
            what a probe needs.
    """
    run = Run(Path(recipe.run))
    parent = resolve_parent("encoder", recipe.encoder)
    one_process("probe")
    state = run.state(recipe, [parent], restart=restart)
    if state == "done":
        return run
    # What the recipe names is opened before the run directory is touched and before features are made.
    sets = _open_sets(recipe)
    heads = _open_heads(recipe, parent)
    templates = open_templates(recipe.templates) if "zeroshot" in recipe.probes else ()
    encoder = load_encoder(parent.folder or recipe.encoder)
    # Names, sizes and labels of both sets: a change of either makes it another probe.
    data = hash_text(*(part.fingerprint for part in (sets.train, sets.test) if part is not None))
    # Nothing to go on from: features lie outside the run, and the probes on them take little time.
    run.start(recipe, [parent], state="new" if state == "continue" else state, data_fingerprint=data, kind="probe")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    test_x = _features(recipe, sets.test, encoder, parent, device)
    train_x = _features(recipe, sets.train, encoder, parent, device) if sets.train is not None else None
    results = {}
    # A probe that is named twice runs once.
    for probe in dict.fromkeys(recipe.probes):
        if probe in ("zeroshot", "tags"):
            results[TASKS[probe]] = _by_name(probe, heads, sets, test_x, templates)
        else:
            assert train_x is not None  # the recipe's schema sees to it
            results[TASKS[probe]] = _by_pictures(probe, recipe, sets, train_x, test_x)
    scores = {name: _score(name, result, sets, recipe, encoder, parent) for name, result in results.items()}
    write_json(run.path / "scores.json", {"tasks": scores})
    run.finish("done")
    return run


def _open_sets(recipe: ProbeRecipe) -> _Sets:
    """The labelled sets; training pictures only where a probe learns from them."""
    data = recipe.data
    learns = bool({"linear", "kshot", "knn"} & set(recipe.probes))
    train = open_labelled(data.train, data) if learns and data.train is not None else None
    test = open_labelled(data.test, data)
    # Training says which classes there are and in which order; without it the test set does.
    classes = test.classes if train is None else train.classes
    test.targets(classes)  # refuses a class that training has not
    # k-shot checks this too, but only after features that may have taken long to make.
    if train is not None and "kshot" in recipe.probes:
        check_shots(torch.tensor(train.targets(classes)), classes, recipe.shots)
    by_name = {"zeroshot", "tags"} & set(recipe.probes)
    return _Sets(train, test, classes, class_names(classes, data.classes) if by_name else classes)


class _Heads(NamedTuple):
    """Text tower of a clip or lit run; label head of a SuperClass run with its vocabulary."""

    tower: TextTower | None
    tagger: tuple[SuperClassHead, CaptionLabels] | None


def _open_heads(recipe: ProbeRecipe, parent: Parent) -> _Heads:
    """Text tower and label head, for the probes that ask for them."""
    # Imported here: open_clip and what it brings are slow to import, and the other probes need none of it.
    from mmkit.encoders.text import CONFIG, load_text

    tower = tagger = None
    # A hub name has no folder, so neither head nor text tower can lie beside it.
    folder = encoder_folder(parent.folder) if parent.folder is not None else None
    if "zeroshot" in recipe.probes:
        if folder is None or not (folder / CONFIG).is_file():
            mend = "train stage=lit on it and give that run, or use probes=[tags]"
            raise InputError("zero-shot needs a text tower, and this encoder has none", where=recipe.encoder, mend=mend)
        tower = load_text(folder)
    if "tags" in recipe.probes:
        if folder is None or not (folder / "head.safetensors").is_file():
            mend = "give a run of stage=superclass, or use probes=[zeroshot] on a clip or lit run"
            raise InputError("tags needs a label head, and this encoder has none", where=recipe.encoder, mend=mend)
        _, head, labels = load_tagger(folder)
        tagger = (head, labels)
    return _Heads(tower, tagger)


def _features(
    recipe: ProbeRecipe, source: LabelledSource, encoder: VisionEncoder, parent: Parent, device: torch.device
) -> Tensor:
    """Pooled features float[N, D] on the device, from the cache if some probe has made them before."""
    # Beside the run, not inside: starting anew empties the run, and other probes of the same encoder find it here.
    cache = FeatureCache(Path(recipe.run).parent / ".features")
    # What changes a feature; batch size and number of workers do not.
    settings = f"pooled {encoder.image_size} crop {recipe.precision} {recipe.data.max_pixels} {recipe.data.max_bytes}"

    def make() -> Tensor:
        batches = pixel_batches(
            source, size=encoder.image_size, workers=recipe.data.workers, max_pixels=recipe.data.max_pixels, batch_size=_BATCH
        )
        # Autocast rather than bf16 weights: the saved features are float32 either way.
        autocast = torch.bfloat16 if recipe.precision == "bf16" else None
        return extract_features(encoder, batches, device=device, autocast=autocast)

    # Pictures without their classes are in the key: another label of the same pictures needs no new features.
    return cache.get(hash_text(parent.fingerprint, source.pictures_fingerprint, settings), make).to(device)


def _by_pictures(probe: str, recipe: ProbeRecipe, sets: _Sets, train_x: Tensor, test_x: Tensor) -> ProbeResult:
    """A probe that learns from labelled pictures."""
    assert sets.train is not None
    device = train_x.device
    # Numbers of both sets by one list of classes, or equal classes would get different numbers.
    train_y, test_y = (torch.tensor(part.targets(sets.classes), device=device) for part in (sets.train, sets.test))
    known = (train_x, train_y, test_x, test_y)
    if probe == "linear":
        return linear_probe(
            *known,
            num_classes=len(sets.classes),
            lrs=recipe.lrs,
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
        )
    if probe == "kshot":
        return kshot(
            *known, num_classes=len(sets.classes), shots=recipe.shots, draws=recipe.draws, seed=recipe.seed, names=sets.classes
        )
    return knn(*known, k=recipe.k, temperature=recipe.temperature)


def _by_name(probe: str, heads: _Heads, sets: _Sets, test_x: Tensor, templates: tuple[str, ...]) -> ProbeResult:
    """A probe that knows classes by their names."""
    from mmkit.encoders.zeroshot import tag_classes, zero_shot

    test_y = torch.tensor(sets.test.targets(sets.classes), device=test_x.device)
    if probe == "zeroshot":
        assert heads.tower is not None
        return zero_shot(heads.tower.to(test_x.device), test_x, test_y, names=sets.names, templates=templates)
    assert heads.tagger is not None
    head, labels = heads.tagger
    return tag_classes(head.to(test_x.device), labels, test_x, test_y, names=sets.names)


def _score(
    name: str, result: ProbeResult, sets: _Sets, recipe: ProbeRecipe, encoder: VisionEncoder, parent: Parent
) -> dict[str, Any]:
    """A probe's result in the layout of every other score."""
    values = {"accuracy": result.correct} if result.top5 is None else {"accuracy": result.correct, "top5": result.top5}
    # What the probe chose, and what the features came from: enough to make the number again.
    settings = {
        **result.settings,
        "label": recipe.data.label,
        "encoder": recipe.encoder,
        "model_fingerprint": parent.fingerprint,
        "image_size": encoder.image_size,
        "precision": recipe.precision,
        "limit": recipe.data.limit,
    }
    # Only where they had a say: a setting without effect must not look like a condition.
    if name == "zeroshot":
        settings["templates"] = recipe.templates
    if name in ("zeroshot", "tags"):
        settings["classes"] = recipe.data.classes
    return score_layout(name, values, sets.test, settings, seed=recipe.seed)


def score_layout(
    name: str, values: dict[str, list[float]], test: LabelledSource, settings: dict[str, Any], *, seed: int
) -> dict[str, Any]:
    """The layout of a task in scores.json.

    Args:
        name: Of the task.
        values: Metric -> a value for each test picture.
        test: The test pictures.
        settings: Everything the numbers depend on.
        seed: Of the intervals' draws.
    """
    return {
        "task": name,
        "metrics": {metric: sum(each) / len(each) for metric, each in values.items()},
        # No clusters: each picture is in the set once.
        "ci95": {metric: list(mean_ci(each, seed=seed)) for metric, each in values.items()},
        "n": len(test),
        "settings": settings,
        "per_sample": [{"id": key, **{m: each[i] for m, each in values.items()}} for i, key in enumerate(test.keys)],
    }
