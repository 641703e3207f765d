"""SuperClass vision encoders: towers, caption labels, IDF, the soft-label loss, export, probes.

The names below are loaded on first use, so that ``import mmkit.encoders`` stays light: torch and timm are imported
only by the modules that need them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmkit.encoders.contrastive import infonce_sum, sigmoid_sum
    from mmkit.encoders.export import export_model
    from mmkit.encoders.features import FeatureCache, extract_features
    from mmkit.encoders.head import SuperClassHead
    from mmkit.encoders.idf import OnlineIDF, load_table, row_normalised, save_table
    from mmkit.encoders.init import init_encoder, load_head
    from mmkit.encoders.labels import CaptionLabels
    from mmkit.encoders.loss import soft_label_loss, soft_label_loss_sum
    from mmkit.encoders.loss_kinds import make_kind
    from mmkit.encoders.probe import ProbeResult, knn, linear_probe
    from mmkit.encoders.ragged import pack_labels
    from mmkit.encoders.save import load_encoder, load_tagger, save_encoder
    from mmkit.encoders.siglip import to_siglip
    from mmkit.encoders.text import TextTower, load_text
    from mmkit.encoders.vit import VisionEncoder, build_encoder

_MODULE_OF = {
    "build_encoder": "vit",
    "CaptionLabels": "labels",
    "export_model": "export",
    "extract_features": "features",
    "FeatureCache": "features",
    "infonce_sum": "contrastive",
    "init_encoder": "init",
    "knn": "probe",
    "linear_probe": "probe",
    "load_encoder": "save",
    "load_head": "init",
    "load_table": "idf",
    "load_tagger": "save",
    "load_text": "text",
    "make_kind": "loss_kinds",
    "OnlineIDF": "idf",
    "pack_labels": "ragged",
    "ProbeResult": "probe",
    "row_normalised": "idf",
    "save_encoder": "save",
    "save_table": "idf",
    "sigmoid_sum": "contrastive",
    "soft_label_loss": "loss",
    "soft_label_loss_sum": "loss",
    "SuperClassHead": "head",
    "TextTower": "text",
    "to_siglip": "siglip",
    "VisionEncoder": "vit",
}

__all__ = [
    "CaptionLabels",
    "FeatureCache",
    "OnlineIDF",
    "ProbeResult",
    "SuperClassHead",
    "TextTower",
    "VisionEncoder",
    "build_encoder",
    "export_model",
    "extract_features",
    "infonce_sum",
    "init_encoder",
    "knn",
    "linear_probe",
    "load_encoder",
    "load_head",
    "load_table",
    "load_tagger",
    "load_text",
    "make_kind",
    "pack_labels",
    "row_normalised",
    "save_encoder",
    "save_table",
    "sigmoid_sum",
    "soft_label_loss",
    "soft_label_loss_sum",
    "to_siglip",
]


def __getattr__(name: str) -> Any:
    """Import the module behind a public name when the name is first used (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
