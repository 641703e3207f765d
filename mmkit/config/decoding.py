"""How text is chosen: greedy, beams, sampling, ClipCap's own beams."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

from pydantic import Field, model_validator

from mmkit.config.section import Section

SAMPLE_KEYS = ("temperature", "top_p", "top_k", "seed")


class DecodingConfig(Section):
    """How text is chosen. Keys of one way are refused with another: they would have no effect."""

    max_new_tokens: int = Field(32, ge=1)
    decoding: Literal["search", "sample", "paper"] = Field(
        "search", description="search: greedy, or beams; sample; paper: ClipCap's beams, averaged over length, up to a full stop"
    )
    # Greedy, as in LLaVA's evaluation.
    num_beams: int = Field(1, ge=1, description="search: 1 is greedy; paper: 5 if not given")
    # None instead of the numbers below, so that a key given for another way can be told and refused.
    length_penalty: float | None = Field(None, description="beams: exponent of the length that divides a score; null: 1")
    temperature: float | None = Field(None, gt=0, description="sample; null: 1")
    top_p: float | None = Field(None, gt=0, le=1, description="sample: the likeliest tokens of this mass; null: all")
    top_k: int | None = Field(None, ge=1, description="sample: the likeliest tokens of this number; null: all")
    seed: int | None = Field(None, ge=0, description="sample: of the draws; null: 0")

    # Before the checks: once num_beams has its default, nobody can tell that it was not given.
    @model_validator(mode="before")
    @classmethod
    def _papers_beams(cls, value: Any) -> Any:
        # ClipCap's beam size (facts/clipcap.md 5). Written into the resolved recipe, so that it stands beside the score.
        if isinstance(value, dict) and value.get("decoding") == "paper":
            return {"num_beams": 5, **value}
        return value

    @model_validator(mode="after")
    def _keys_of_the_way(self) -> DecodingConfig:
        given = [key for key in SAMPLE_KEYS if getattr(self, key) is not None]
        if given and self.decoding != "sample":
            raise ValueError(f"{', '.join(given)} belong to decoding=sample, not to {self.decoding}")
        if self.decoding == "sample" and self.num_beams > 1:
            raise ValueError("num_beams belongs to decoding=search or paper, not to sample")
        if self.length_penalty is not None and (self.decoding != "search" or self.num_beams == 1):
            raise ValueError("length_penalty belongs to decoding=search with num_beams of 2 or more")
        return self

    def describe(self) -> str:
        """The way in a few words, as it stands beside a score."""
        if self.decoding == "paper":
            return f"ClipCap's beam {self.num_beams} (averaged over length, up to a full stop)"
        if self.decoding == "sample":
            given = {"temperature": self.temperature or 1.0, "top_p": self.top_p, "top_k": self.top_k, "seed": self.seed or 0}
            return "sample, " + ", ".join(f"{name} {value:g}" for name, value in given.items() if value is not None)
        penalty = "" if self.length_penalty is None else f", length penalty {self.length_penalty:g}"
        return f"beam {self.num_beams}{penalty}" if self.num_beams > 1 else "greedy"


class GenerationConfig(DecodingConfig):
    """Decoding settings of an evaluation, printed beside every score."""

    batch_size: Union[Annotated[int, Field(ge=1)], Literal["auto"]] = Field(
        "auto", description="questions answered together; auto: what fits the memory. Halved where memory runs out"
    )
    cache: Literal["dynamic", "static"] = Field(
        "dynamic",
        description="of keys and values. dynamic: questions on a picture share its part; static: of one size, compiled on a GPU",
    )
    reuse: bool = Field(True, description="take answers that the same model gave to the same question in an earlier run")

    def decoding_alone(self) -> dict[str, Any]:
        """The keys of `DecodingConfig`: what an answer depends on."""
        return self.model_dump(include=set(DecodingConfig.model_fields))
