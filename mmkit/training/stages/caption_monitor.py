"""Captions of the validation pictures while a captioner trains, scored as an evaluation scores them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmkit.config import CaptionMonitorConfig, DecodingConfig
from mmkit.errors import InputError
from mmkit.eval.scorers import bleu, ptb
from mmkit.eval.scorers.cider import cider_d
from mmkit.eval.scorers.rouge import rouge_l
from mmkit.models.captioning import write_captions
from mmkit.models.decoding import draw_seed
from mmkit.training.objective import Finding

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from mmkit.distributed.engine import Engine
    from mmkit.models.clipcap import ClipCap
    from mmkit.training.stages.clipcap import FeatureSamples


class CaptionMonitor:
    """CIDEr-D, BLEU-4 and ROUGE-L of generated captions; every process writes its share of them.

    The scorers are those of ``mmkit eval`` with the Python tokenizer, so a number here is the evaluation's on the same pictures.
    """

    def __init__(
        self,
        model: ClipCap,
        tokenizer: PreTrainedTokenizerBase,
        samples: FeatureSamples,
        config: CaptionMonitorConfig,
        how: DecodingConfig,
    ) -> None:
        """Group the captions by picture and tokenise them once.

        Raises:
            InputError: Fewer than two pictures, of which CIDEr is always 0.
        """
        assert config.every is not None
        self.every, self.config, self.how = config.every, config, how
        self.model, self.tokenizer, self.samples = model, tokenizer, samples
        # Row of the features -> first pair of the picture, and its captions; in the order of the file.
        self.first: dict[int, int] = {}
        found: dict[int, list[str]] = {}
        for number, (pair, row) in enumerate(zip(samples.pairs, samples.rows.tolist(), strict=True)):
            self.first.setdefault(row, number)
            found.setdefault(row, []).append(pair.caption)
        self.rows = list(found)[: config.pictures]
        if len(self.rows) < 2:
            raise InputError("captions are scored on two pictures or more", where="data.val", mend="give more pictures")
        self.captions = [found[row] for row in self.rows]
        self.references = [ptb.TOKENIZERS["python"](captions) for captions in self.captions]

    def look(self, engine: Engine) -> Finding:
        """``val_CIDEr``, ``val_Bleu_4`` and ``val_ROUGE_L`` of the weights as they are, and the first few captions."""
        texts = self._write(engine)
        hypotheses = ptb.TOKENIZERS["python"](texts)
        pairs = list(zip(hypotheses, self.references, strict=True))
        # i64[1, 10]: BLEU comes from sums over the set, CIDEr-D and ROUGE-L are means over pictures, as in pycocoevalcap.
        counters = np.stack([bleu.bleu_statistics(h, r) for h, r in pairs]).sum(axis=0, keepdims=True)
        numbers = {
            "val_CIDEr": float(np.mean(cider_d(hypotheses, self.references))),
            "val_Bleu_4": float(bleu.bleu_from_statistics(counters)[0, -1]),
            "val_ROUGE_L": float(np.mean([rouge_l(h, r) for h, r in pairs])),
        }
        return Finding(numbers=numbers, texts=self._examples(texts))

    def _examples(self, texts: list[str]) -> list[dict[str, Any]]:
        """The first few captions beside their references."""
        count = self.config.samples
        # Not strict: only the first `count` texts are shown.
        named = zip(self.rows[:count], texts, self.captions, strict=False)
        return [
            {"key": self._pair(row).name, "image": self._pair(row).image.path, "prediction": text, "references": captions}
            for row, text, captions in named
        ]

    def _pair(self, row: int) -> Any:
        """The first pair of the picture whose features are in a row."""
        return self.samples.pairs[self.first[row]]

    def _write(self, engine: Engine) -> list[str]:
        """Captions of all pictures in order, the same on every process."""
        size, world = len(self.rows), engine.world_size
        # Every process makes equally many batches: under ZeRO-3 a forward pass is a matter of all of them.
        each = -(-size // world)
        # In turn, so that a picture is seen again in the last round only.
        mine = [min(i * world + engine.rank, size - 1) for i in range(each)]
        texts: list[str] = []
        for begin in range(0, each, self.config.batch_size):
            numbers = [self.first[self.rows[i]] for i in mine[begin : begin + self.config.batch_size]]
            features = torch.stack([self.samples.features_of(number) for number in numbers])
            # By name and not by place: the same draws whatever the batch and the number of processes.
            names = [self.samples.pairs[number].name for number in numbers]
            draws = [draw_seed(self.how.seed or 0, name.encode(errors="backslashreplace")) for name in names]
            texts += write_captions(
                self.model, self.tokenizer, features.to(engine.device), self.how, draws=draws, together=in_step(engine)
            )
        # In order of rank: rank r wrote pictures r, r + W, ...
        gathered = engine.gather(texts)
        return [gathered[i % world * each + i // world] for i in range(size)]


def in_step(engine: Engine) -> Callable[[bool], bool] | None:
    """Asks whether any process has something left to write, where forward passes have to be made together; None elsewhere."""
    # ZeRO-3 gathers the weights of each layer from all processes; which stage DeepSpeed runs is its own matter.
    if engine.world_size == 1 or not engine.uses_deepspeed:
        return None
    return lambda unfinished: bool(engine.sum(engine.numbers(unfinished)))
