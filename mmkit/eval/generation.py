"""From examples to answers: the loop of an evaluation.

Every question is answered once: not where an earlier start of the run has its answer, nor where an earlier run had asked the
same model the same. The others are answered in batches that need each picture for a short while, and each batch is on disk
before the next one begins.
"""

from __future__ import annotations

import functools
import gc
import logging
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from mmkit.config import DecodingConfig, EvalRecipe, TaskConfig
from mmkit.data.skipped import LeftOut, SampleError
from mmkit.distributed.ranks import Ranks
from mmkit.errors import InputError
from mmkit.eval.batch_size import fitting, is_out_of_memory
from mmkit.eval.examples import Example, Id, Picture
from mmkit.eval.parts import Answers, Part, Speed
from mmkit.eval.pictures import FeatureStore, Reader, Square, content_hash, picture_key
from mmkit.eval.reuse import AnswerCache
from mmkit.eval.schedule import Planned, by_pictures, next_batch, picture_order, plan, share_of
from mmkit.models.decoding import choose_decoding
from mmkit.models.inference import Captioner, Mllm
from mmkit.run import Run

logger = logging.getLogger(__name__)
# Seconds between two lines about how far it is.
_TELL = 30.0


class Generator:
    """Answers the tasks of one evaluation on one process."""

    def __init__(
        self,
        open_model: Callable[[], Any],
        recipe: EvalRecipe,
        run: Run,
        ranks: Ranks,
        cache: Callable[[], AnswerCache],
    ) -> None:
        """Take what an evaluation has; nothing is opened before it is needed.

        Args:
            open_model: Gives a :class:`Captioner` or :class:`Mllm`; not called where nothing is left to be asked.
            recipe: Bounds on pictures.
            run: Its directory gets the answers.
            ranks: The processes among which the questions are shared out.
            cache: Gives the answers of earlier runs.
        """
        self._recipe, self._run, self._ranks = recipe, run, ranks
        self._model, self._cache = functools.cache(open_model), functools.cache(cache)
        self._part = Part(run.path, ranks.rank)
        # Over all tasks: VQAv2 and TextVQA may ask about the same pictures.
        self._features = FeatureStore()

    def answer(self, name: str, task: TaskConfig, examples: Sequence[Example], known: Answers) -> None:
        """Answer this process's share of a task's questions; the answers go to its part of the run directory.

        Args:
            name: The task's name.
            task: How to answer.
            examples: All questions, with the pictures to be shown.
            known: What earlier starts answered; the same on all processes.

        Raises:
            InputError: More pictures are unreadable than allowed, a prompt cannot be asked, or one question is too much for the
                memory.
            StoppedError: A signal came; what is answered is on disk.
            LostError: Another process is gone.
        """
        # Before they are shared out: a run that goes on with more processes gives each of them work.
        groups = by_pictures([e for e in examples if e.id not in known.texts])
        mine = share_of(groups, self._ranks.rank, self._ranks.world_size)
        how = choose_decoding(DecodingConfig(), task.generation.decoding_alone())
        mine = self._take_known(name, task, mine, how)
        if not mine:
            return
        rows = self._planned(mine)
        batches = Batches(self._model(), self._features, self._reader(rows), task, how, size=self._size(task, rows, how))
        tally = _Tally(name, len(mine), of=len(examples), max_skipped=self._recipe.max_skipped, lost=len(known.left_out))
        began, encoded = time.monotonic(), self._features.encoded
        try:
            place = 0
            while place < len(rows):
                self._ranks.look()
                batch = next_batch(rows, place, batches.size)
                place += len(batch)
                self._keep(name, task, batches, batch, batches.answer(batch, following=rows[place : place + 1]), how, tally)
        finally:
            batches.reader.close()
            pictures = self._features.encoded - encoded
            self._part.took(name, Speed(tally.answered, time.monotonic() - began, pictures, batches.size))

    def _planned(self, examples: Sequence[Example]) -> list[Planned]:
        """Questions in the order in which they are answered."""
        model = self._model()
        pictures = [tuple(map(picture_key, e.images)) for e in examples]
        if not isinstance(model, Mllm):
            return plan(examples, [()] * len(examples), pictures, [0] * len(examples))
        ids = [model.encode(e.prompt, len(e.images)) for e in examples]
        return plan(examples, ids, pictures, [model.shared(row) for row in ids])

    def _reader(self, rows: Sequence[Planned]) -> Reader:
        """Reads ahead what is not encoded yet."""
        needed = {key: picture for key, picture in picture_order(rows).items() if self._features.get(key) is None}
        limits = {"max_bytes": self._recipe.max_bytes, "max_pixels": self._recipe.max_pixels}
        return Reader(needed.items(), self._model().square, **limits)

    def _size(self, task: TaskConfig, rows: Sequence[Planned], how: DecodingConfig) -> int:
        """Questions of a batch, as asked for or as many as fit."""
        model, size = self._model(), task.generation.batch_size
        if size != "auto":
            return size
        lm = model.model.config.get_text_config() if isinstance(model, Mllm) else model.model.lm.config
        prompt = max(len(row.ids) for row in rows) if isinstance(model, Mllm) else model.model.config.prefix_length
        itemsize = next(model.model.parameters()).element_size()
        return fitting(lm, prompt + how.max_new_tokens, itemsize=itemsize, beams=how.num_beams, device=model.device)

    def _keep(
        self,
        name: str,
        task: TaskConfig,
        batches: Batches,
        batch: Sequence[Planned],
        texts: dict[Id, str],
        how: DecodingConfig,
        tally: _Tally,
    ) -> None:
        """Put a batch on disk and into the cache; end the run where too much is lost."""
        self._part.add(name, texts)
        lost = {row.example.id: left for row in batch if (left := batches.left_out(row)) is not None}
        if lost:
            self._part.leave_out(name, lost)
            self._run.skip(list(lost.values()))
        if task.generation.reuse and texts:
            found = [row for row in batch if row.example.id in texts]
            contents = [[batches.content[key] for key in row.pictures] for row in found]
            keys = [AnswerCache.key(how, row.example.prompt, c) for row, c in zip(found, contents, strict=True)]
            self._cache().add({key: texts[row.example.id] for key, row in zip(keys, found, strict=True)})
        tally.count(len(texts), len(lost), self._run)

    def _take_known(self, name: str, task: TaskConfig, examples: list[Example], how: DecodingConfig) -> list[Example]:
        """Write down what an earlier run has answered; returns the others."""
        # Looked at only where there is something: reading all pictures twice is no gain.
        if not task.generation.reuse or not examples or not len(self._cache()):
            return examples
        pictures = {key: p for e in examples for p in e.images for key in [picture_key(p)]}
        contents = dict(zip(pictures, _hash_all(list(pictures.values()), self._recipe.max_bytes), strict=True))
        found: dict[Id, str] = {}
        for example in examples:
            hashes = [contents[picture_key(p)] for p in example.images]
            # None: a picture that cannot be read is no known one.
            whole = [h for h in hashes if h is not None]
            text = self._cache().get(AnswerCache.key(how, example.prompt, whole)) if len(whole) == len(hashes) else None
            if text is not None:
                found[example.id] = text
        if found:
            self._part.add(name, found, from_cache=True)
            logger.info("%s: %d of %d answers taken from earlier runs (generation.reuse)", name, len(found), len(examples))
        return [e for e in examples if e.id not in found]


class Batches:
    """Answers batches of one task, in halves where memory runs out.

    Attributes:
        size: Questions of a batch, from now on.
        reader: Gives the pictures.
        content: Hash of the bytes of each picture that was read.
    """

    def __init__(
        self, model: Mllm | Captioner, features: FeatureStore, reader: Reader, task: TaskConfig, how: DecodingConfig, *, size: int
    ) -> None:
        self.size, self.reader, self.content = size, reader, dict[str, str]()
        self._model, self._features, self._how, self._cache = model, features, how, task.generation.cache
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
        # Outside the except block, whose error would hold the tensors of the call that failed.
        if (found := self._try(batch, following)) is not None:
            return found
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            what = f"question {batch[0].example.id!r} alone does not fit in memory"
            raise InputError(what, where="generation", mend="use fewer max_new_tokens or beams, or a device with more memory")
        half = (len(batch) + 1) // 2
        if half < self.size:
            logger.warning("out of memory with %d questions at a time: going on with %d", len(batch), half)
            self.size = half
        first, second = batch[:half], batch[half:]
        return self.answer(first, following=second[:1]) | self.answer(second, following=following)

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
            whole = model.ask(row.ids, [features for features, _ in pictures], key=row.pictures, draw=draw)
            asked.append(whole if row.key is not None else model.alone(whole))
        return model.texts(model.writer.write(asked, how, cache=self._cache, keep=keep))

    def left_out(self, row: Planned) -> LeftOut | None:
        """Why a question gets no answer; None: it gets one."""
        bad = next((self._unusable[key] for key in row.pictures if key in self._unusable), None)
        return None if bad is None else LeftOut(bad[0], str(row.example.id), bad[1])


class _Tally:
    """Counts answers and losses of a task on this process, and tells now and then."""

    def __init__(self, name: str, total: int, *, of: int, max_skipped: float, lost: int) -> None:
        """Start to count ``total`` questions of a task of ``of``, in which ``lost`` were lost before."""
        self.answered, self._lost = 0, lost
        self._name, self._total, self._of, self._max_skipped = name, total, of, max_skipped
        self._began = self._told = time.monotonic()

    def count(self, answered: int, lost: int, run: Run) -> None:
        """Count a batch. Raises InputError: more pictures are unreadable than allowed."""
        self.answered += answered
        self._lost += lost
        # After every batch: a wrong image_root ends the run at once, not after the last picture.
        check_lost(self._lost, self._of, self._max_skipped, run)
        now = time.monotonic()
        if now - self._told > _TELL:
            self._told = now
            rate = self.answered / (now - self._began)
            logger.info("%s: %d of %d answered, %.1f a second", self._name, self.answered, self._total, rate)


def check_lost(lost: int, of: int, max_skipped: float, run: Run) -> None:
    """Refuse to score where too many pictures are unreadable.

    Args:
        lost: Questions of a task without an answer.
        of: All its questions.
        max_skipped: Share that may be lost.
        run: Lists them.

    Raises:
        InputError: More are lost than allowed.
    """
    if lost > max_skipped * of:
        raise InputError(
            f"{lost} of {of} pictures cannot be used, over the limit of {max_skipped:.2%}",
            where=run.path / "skipped.jsonl",
            mend="check image_root and image_name, or raise max_skipped",
        )


def _hash_all(pictures: Sequence[Picture], max_bytes: int) -> list[str | None]:
    """Hash of each picture's bytes, None of one that cannot be read; in threads, since most of it is waiting for the disk."""

    def one(picture: Picture) -> str | None:
        try:
            return content_hash(picture.read(max_bytes))
        except SampleError:
            return None

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, pictures))
