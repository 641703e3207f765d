"""What is looked at while training runs, and what follows from it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mmkit.config.section import Section


class StoppingConfig(Section):
    """Which validation number decides over the product, and when training ends because it gets no better."""

    metric: str = Field(description="a number of metrics.jsonl, such as val_loss, val_CIDEr, knn_accuracy")
    mode: Literal["max", "min"]
    patience: int | None = Field(None, ge=1, description="looks in a row without a better one; null: train to the end")
    min_delta: float = Field(0.0, ge=0, description="by how much a number must be better to count")


class CaptionMonitorConfig(Section):
    """Captions of the validation pictures while a captioner trains, scored against their references."""

    every: int | None = Field(None, ge=1, description="steps; null: never")
    # Two: of one picture CIDEr is always 0, for every n-gram is in every document.
    pictures: int | None = Field(None, ge=2, description="the first N of data.val; null: all. CIDEr depends on the set")
    batch_size: int = Field(64, ge=1, description="pictures of a batch on each process")
    samples: int = Field(8, ge=0, description="captions that are kept with their references, in samples.jsonl")

    @model_validator(mode="after")
    def _fits(self) -> CaptionMonitorConfig:
        # By value: the resolved recipe, in which every default is written out, has to load again.
        changed = [k for k, field in type(self).model_fields.items() if getattr(self, k) != field.default]
        if self.every is None and changed:
            raise ValueError("give every=STEPS too: without it nothing is captioned")
        return self
