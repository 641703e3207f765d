"""Batches of questions through a model: each picture once through the tower, halves where memory runs out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch

from mmkit.config import DecodingConfig
from mmkit.data.skipped import LeftOut, SampleError
from mmkit.errors import InputError
from mmkit.eval.batch_size import is_out_of_memory
from mmkit.eval.examples import Id
from mmkit.eval.pictures import FeatureStore, Reader, Square
from mmkit.eval.schedule import Planned, picture_order
from mmkit.models.answering import CacheKind
from mmkit.models.inference import Captioner, Mllm

logger = logging.getLogger(__name__)


class Batches:
    """Answers batches of one task, in halves where memory runs out.

    Attributes:
        size: Questions of a batch, from now on.
        reader: Gives the pictures.
        content: Hash of the bytes of each picture that was read.
        cut: Ids of answers of an MLLM that end by their length and not by an end token.
    """

    def __init__(
        self,
        model: Mllm | Captioner,
        features: FeatureStore,
        reader: Reader,
        cache: CacheKind,
        how: DecodingConfig,
        *,
        size: int,
    ) -> None:
        """Take what a task is answered with; ``size`` questions at a time."""
        self.size, self.reader, self.content, self.cut = size, reader, dict[str, str](), set[Id]()
        self._model, self._features, self._how, self._cache = model, features, how, cache
        # Key -> picture's name and what is wrong with it.
        self._unusable: dict[str, tuple[str, str]] = {}

    def answer(self, batch: Sequence[Planned], *, following: Sequence[Planned]) -> dict[Id, str]:
        """Answers by id; none of questions with a picture that cannot be used.

        Args:
            batch: Neighbours in the order.
            following: What comes next, one row at most: what it shares is kept.

        Raises:
            InputError: One question alone is too much for the memory.
        """
        found: dict[Id, str] = {}
        while batch:
            part, rest = batch[: self.size], batch[self.size :]
            # Outside an except block, whose error would hold the tensors of the call that failed.
            if (texts := self._try(part, rest[:1] or following)) is None:
                self._shrink(part)
                continue
            found |= texts
            batch = rest
        return found

    def _shrink(self, part: Sequence[Planned]) -> None:
        """Go on with half as many questions as were too much. Raises InputError: it was one."""
        # What is kept for later takes room too; a picture that is needed again is encoded again.
        self._features.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(part) == 1:
            what = f"question {part[0].example.id!r} alone does not fit in memory"
            raise InputError(what, where="generation", mend="use fewer max_new_tokens or beams, or a device with more memory")
        self.size = (len(part) + 1) // 2
        logger.warning("out of memory with %d questions at a time: going on with %d", len(part), self.size)

    def _try(self, batch: Sequence[Planned], following: Sequence[Planned]) -> dict[Id, str] | None:
        """Answers, or None where memory ran out."""
        try:
            seen = self._see(batch)
            rows = [row for row in batch if self.left_out(row) is None]
            keep = {row.key for row in following if row.key is not None}
            return dict(zip((r.example.id for r in rows), self._write(rows, seen, keep), strict=True)) if rows else {}
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _see(self, batch: Sequence[Planned]) -> dict[str, tuple[torch.Tensor, Square]]:
        """Features and squares of a batch's pictures, by key; each picture goes through the tower once."""
        pictures = picture_order(batch)
        seen = {key: found for key in pictures if (found := self._features.get(key)) is not None}
        new: dict[str, Square] = {}
        for key, picture in pictures.items():
            if key in seen or key in self._unusable:
                continue
            try:
                new[key] = self.reader.take(key, picture)
            except SampleError as error:
                self._unusable[key] = (picture.name, str(error))
        if new:
            features = list(self._model.features([square.pixels for square in new.values()]))
            self._features.put(list(new), list(new.values()), features)
            seen |= dict(zip(new, zip(features, new.values(), strict=True), strict=True))
        self.content |= {key: square.content for key, (_, square) in seen.items()}
        return seen

    def _write(self, rows: Sequence[Planned], seen: dict[str, tuple[torch.Tensor, Square]], keep: Collection[Any]) -> list[str]:
        """The answers' texts."""
        model, how = self._model, self._how
        shown = [[seen[key] for key in row.pictures] for row in rows]
        if isinstance(model, Captioner):
            features = torch.stack([row[0][0] for row in shown])
            return model.write(features, how, [model.draw(how, row[0][1].pixels) for row in shown])
        asked = []
        for row, pictures in zip(rows, shown, strict=True):
            draw = model.draw(how, row.example.prompt, [square.pixels for _, square in pictures])
            asked.append(model.ask(row.prompt, [features for features, _ in pictures], key=row.key, draw=draw))
        written = model.writer.write(asked, how, cache=self._cache, keep=keep)
        self.cut |= {row.example.id for row, ids in zip(rows, written, strict=True) if ids[-1] not in model.writer.stop}
        return model.texts(written)

    def left_out(self, row: Planned) -> LeftOut | None:
        """Why a question gets no answer; None: it gets one."""
        bad = next((self._unusable[key] for key in row.pictures if key in self._unusable), None)
        return None if bad is None else LeftOut(bad[0], str(row.example.id), bad[1])
