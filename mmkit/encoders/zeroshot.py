"""Classes by their names alone: with a text tower (CLIP, LiT), or with the label head's own scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmkit.encoders.head import SuperClassHead
from mmkit.encoders.labels import CaptionLabels
from mmkit.encoders.probe import ProbeResult, ranked_result
from mmkit.encoders.templates import fill
from mmkit.encoders.text import TextTower
from mmkit.errors import InputError


@torch.inference_mode()
def class_embeddings(tower: TextTower, names: Sequence[str], templates: Sequence[str], *, batch_size: int = 256) -> Tensor:
    """Mean of a class's normalised prompt embeddings, normalised again (open_clip/zero_shot_classifier.py).

    Args:
        tower: On the device to compute on.
        names: C class names.
        templates: T prompts with ``{}``.
        batch_size: Prompts at a time.

    Returns:
        float32[C, E] on the tower's device, rows of length 1.
    """
    # By class, then template: the view below rests on this order.
    prompts = [prompt for name in names for prompt in fill(templates, name)]
    # A module has no device; the tower's weights are all in one place.
    device = tower.logit_scale.device
    parts = []
    for start in range(0, len(prompts), batch_size):
        tokens = tower.tokenize(prompts[start : start + batch_size]).to(device)
        # Normalised already, so a long and a short embedding weigh alike in the mean.
        parts.append(tower.encode_text(tokens).float())
    # Once more: the mean of unit vectors is shorter the less the prompts agree.
    return F.normalize(torch.cat(parts).view(len(names), len(templates), -1).mean(dim=1), dim=1)


@torch.inference_mode()
def zero_shot(
    tower: TextTower, test_x: Tensor, test_y: Tensor, *, names: Sequence[str], templates: Sequence[str], batch_size: int = 256
) -> ProbeResult:
    """Classify pictures by the nearest class name (arXiv 2103.00020, section 3.1.2).

    Args:
        tower: Text tower that was trained to meet the encoder of the features.
        test_x: float[M, D], pooled features.
        test_y: i64[M].
        names: C class names.
        templates: Prompts with ``{}``.
        batch_size: Prompts at a time.

    Returns:
        Top-1, and top-5 where there are more than five classes.
    """
    classes = class_embeddings(tower, names, templates, batch_size=batch_size)
    # Cosines: both sides have length 1, and the learnt temperature changes no order.
    top = [
        (tower.encode_image(part.to(classes.device)) @ classes.T).topk(min(5, len(names))).indices for part in test_x.split(1024)
    ]
    return ranked_result(torch.cat(top), test_y, len(names), probe="zeroshot", prompts=len(templates))


@torch.inference_mode()
def tag_classes(
    head: SuperClassHead, labels: CaptionLabels, test_x: Tensor, test_y: Tensor, *, names: Sequence[str]
) -> ProbeResult:
    """Classify pictures by the label head's scores of the tokens in each class name; no text tower, no labelled picture.

    The score of a class is the mean over its tokens of the token's logit minus that token's mean logit over the test pictures.
    Without this a frequent token is high in every picture, and its class would win everywhere. The mean logit is a statistic
    of unlabelled test pictures: a score depends on which pictures are scored together. (The softmax over labels makes no
    difference: its normaliser is the same for all classes of a picture.)

    Args:
        head: Label head, on the device to compute on.
        labels: Its vocabulary.
        test_x: float[M, D], pooled features.
        test_y: i64[M].
        names: C class names.

    Returns:
        Top-1, and top-5 where there are more than five classes.

    Raises:
        InputError: A class name without a label.
    """
    matrix, ids = _token_shares(labels, names)
    device = head.weight.device
    weight, bias = head.weight[ids.to(device)].float(), head.bias[ids.to(device)].float()
    # Only the labels in class names: 50,000 pictures times 49,408 labels would not fit.
    logits = torch.cat([F.linear(head(part.to(device, head.weight.dtype)).float(), weight, bias) for part in test_x.split(4096)])
    logits = logits - logits.mean(dim=0)
    top = (logits @ matrix.to(device)).topk(min(5, len(names))).indices
    rule = "mean over tokens of logit minus its mean over the test set"
    return ranked_result(top, test_y, len(names), probe="tags", rule=rule, tokens=len(ids))


def _token_shares(labels: CaptionLabels, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """float[L, C], 1/n where one of the n labels of a class name is row l, and the ids i64[L] of the rows."""
    # Token sets, as in training: a token that a name has twice counts once.
    rows = [labels.encode_one(name) for name in names]
    if without := [name for name, row in zip(names, rows, strict=True) if not row]:
        what = f"no label of the vocabulary is in the class name {', '.join(map(repr, without[:5]))}"
        raise InputError(what, where=f"labels {labels.name}", mend="name the classes by data.classes")
    ids = sorted({label for row in rows for label in row})
    place = {label: i for i, label in enumerate(ids)}
    matrix = torch.zeros(len(ids), len(names))
    for column, row in enumerate(rows):
        # Shares that sum to 1, so that long names and short ones are on one scale.
        matrix[[place[label] for label in row], column] = 1 / len(row)
    return matrix, torch.tensor(ids)
