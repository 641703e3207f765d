"""mmkit: from raw image-text pairs to a table fit for a paper.

Stable names: :func:`mmkit.load`, :func:`mmkit.score`, and ``mmkit.encoders.{CaptionLabels, OnlineIDF, soft_label_loss}``.
Importing this package is cheap; torch and transformers come in when a function needs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "score"]


def load(path: str | Path) -> Any:
    """Open an encoder, captioner or MLLM, ready for inference.

    Args:
        path: A finished run, a model folder, or ``timm:NAME`` for an encoder.

    Returns:
        A :class:`mmkit.models.inference.Tagger`, ``Captioner`` or ``Mllm``; each has ``predict(images, ...)``.
    """
    from mmkit.models.inference import load_model

    return load_model(str(path))


def score(task: str, predictions: Any, annotations: Any, questions: Any = None, **settings: Any) -> dict[str, Any]:
    """Official scoring of a result file; the same object as ``mmkit score --out`` writes.

    Args:
        task: ``coco-caption``, ``vqav2`` or ``textvqa``.
        predictions: Official result file (path) or its rows.
        annotations: Official annotation file (path) or its content.
        questions: VQA v2 question file, where the task has one.
        **settings: As :func:`mmkit.eval.score.score`; an unknown one is an error.

    Returns:
        ``{"task", "metrics", "ci95", "n", "settings", "per_sample"}``; metrics are fractions.
    """
    from mmkit.eval.score import score as run

    return run(task, predictions, annotations, questions, **settings)
