"""The comparison report: run directories in, one self-contained HTML file + Markdown + JSON out."""

from __future__ import annotations

from mmkit.eval.report.render import build_report

__all__ = ["build_report"]
