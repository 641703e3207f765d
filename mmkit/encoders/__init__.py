"""SuperClass vision encoders: towers, caption labels, IDF, the soft-label loss, export, probes.

The names below are loaded on first use, so that ``import mmkit.encoders`` stays light: torch and timm are imported
only by the modules that need them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmkit.encoders.features import FeatureCache, extract_features
    from mmkit.encoders.head import SuperClassHead
    from mmkit.encoders.idf import OnlineIDF, row_normalised
    from mmkit.encoders.labels import CaptionLabels
    from mmkit.encoders.loss import soft_label_loss, soft_label_loss_sum
    from mmkit.encoders.probe import ProbeResult, knn, linear_probe
    from mmkit.encoders.ragged import pack_labels
    from mmkit.encoders.save import load_encoder, load_tagger, save_encoder
    from mmkit.encoders.siglip import to_siglip
    from mmkit.encoders.vit import VisionEncoder, build_encoder

_MODULE_OF = {
    "CaptionLabels": "labels",
    "FeatureCache": "features",
    "OnlineIDF": "idf",
    "ProbeResult": "probe",
    "SuperClassHead": "head",
    "VisionEncoder": "vit",
    "build_encoder": "vit",
    "extract_features": "features",
    "knn": "probe",
    "linear_probe": "probe",
    "load_encoder": "save",
    "load_tagger": "save",
    "pack_labels": "ragged",
    "row_normalised": "idf",
    "save_encoder": "save",
    "soft_label_loss": "loss",
    "soft_label_loss_sum": "loss",
    "to_siglip": "siglip",
}

__all__ = [
    "CaptionLabels",
    "FeatureCache",
    "OnlineIDF",
    "ProbeResult",
    "SuperClassHead",
    "VisionEncoder",
    "build_encoder",
    "extract_features",
    "knn",
    "linear_probe",
    "load_encoder",
    "load_tagger",
    "pack_labels",
    "row_normalised",
    "save_encoder",
    "soft_label_loss",
    "soft_label_loss_sum",
    "to_siglip",
]


def __getattr__(name: str) -> Any:
    """Import the module behind a public name when the name is first used (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
