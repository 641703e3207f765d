"""From examples to answers: the loop of an evaluation.

Every question is answered once: not where an earlier start of the run has its answer, nor where an earlier run had asked the
same model the same. The others are answered in batches that need each picture for a short while, and each batch is on disk
before the next one begins.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mmkit.config import DecodingConfig, EvalRecipe, TaskConfig
from mmkit.data.images import open_picture
from mmkit.data.skipped import SampleError
from mmkit.distributed.ranks import Ranks
from mmkit.errors import InputError
from mmkit.eval.batch_size import fitting
from mmkit.eval.batches import Batches
from mmkit.eval.examples import Example, Id, Picture
from mmkit.eval.parts import Answers, Part, Speed
from mmkit.eval.pictures import FeatureStore, Reader, content_hash, picture_key
from mmkit.eval.reuse import AnswerCache
from mmkit.eval.schedule import Planned, by_pictures, next_batch, picture_order, plan, share_of
from mmkit.models.answering import Prompt
from mmkit.models.decoding import choose_decoding
from mmkit.models.inference import Mllm
from mmkit.models.llm import max_positions
from mmkit.run import Run

logger = logging.getLogger(__name__)
# Seconds between two lines about how far it is.
_TELL = 30.0
# Pictures that are hashed between two looks at signals.
_AT_ONCE = 256


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
        self._uses_cache = False
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
            InputError: More pictures are unreadable than allowed, a prompt cannot be asked or is too long, or one question is too
                much for the memory.
            StoppedError: A signal came; what is answered is on disk.
            LostError: Another process is gone.
        """
        # Before they are shared out: a run that goes on with more processes gives each of them work. What was lost is tried
        # again: the run may have ended over it, and the disk be mounted now.
        groups = by_pictures([e for e in examples if e.id not in known.texts or e.id in known.lost])
        mine = share_of(groups, self._ranks.rank, self._ranks.world_size)
        how = choose_decoding(DecodingConfig(), task.generation.decoding_alone())
        mine = self._take_known(name, task, mine, how)
        if not mine:
            return
        rows = self._planned(mine)
        if isinstance(self._model(), Mllm):
            check_length(name, rows, how.max_new_tokens, self._model().model.config.get_text_config())
        batches = Batches(
            self._model(), self._features, self._reader(rows), task.generation.cache, how, size=self._size(task, rows, how)
        )
        tally = _Tally(name, len(mine), of=len(examples), max_skipped=self._recipe.max_skipped)
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

    def close(self) -> None:
        """Bound the folder of kept answers, once all of this run's are in it."""
        if self._uses_cache and self._ranks.is_main:
            self._cache().make_room()

    def _planned(self, examples: Sequence[Example]) -> list[Planned]:
        """Questions in the order in which they are answered."""
        model = self._model()
        pictures = [tuple(map(picture_key, e.images)) for e in examples]
        if not isinstance(model, Mllm):
            return plan(examples, [Prompt()] * len(examples), pictures)
        return plan(examples, [model.prompt(e.prompt, len(e.images)) for e in examples], pictures)

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
        prompt = max(row.length for row in rows) if isinstance(model, Mllm) else model.model.config.prefix_length
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
        cut = batches.cut & texts.keys()
        self._part.add(name, texts, cut=cut)
        lost = {row.example.id: left for row in batch if (left := batches.left_out(row)) is not None}
        if lost:
            self._part.leave_out(name, lost)
            self._run.skip(list(lost.values()))
        if task.generation.reuse and texts:
            found = [row for row in batch if row.example.id in texts]
            contents = [[batches.content[key] for key in row.pictures] for row in found]
            keys = {row.example.id: AnswerCache.key(how, row.example.prompt, c) for row, c in zip(found, contents, strict=True)}
            self._cache().add({key: texts[i] for i, key in keys.items()}, cut={keys[i] for i in cut})
        tally.count(len(texts), len(lost), self._run)

    def _take_known(self, name: str, task: TaskConfig, examples: list[Example], how: DecodingConfig) -> list[Example]:
        """Write down what an earlier run has answered; returns the others."""
        self._uses_cache |= task.generation.reuse
        # Looked at only where there is something: reading all pictures twice is no gain.
        if not task.generation.reuse or not examples or not len(self._cache()):
            return examples
        pictures = {key: p for e in examples for p in e.images for key in [picture_key(p)]}
        limits = {"max_bytes": self._recipe.max_bytes, "max_pixels": self._recipe.max_pixels}
        contents = dict(zip(pictures, _hash_all(list(pictures.values()), **limits, between=self._ranks.look), strict=True))
        found: dict[Id, str] = {}
        cut: set[Id] = set()
        for example in examples:
            hashes = [contents[picture_key(p)] for p in example.images]
            # None: a picture that cannot be read is no known one.
            whole = [h for h in hashes if h is not None]
            key = AnswerCache.key(how, example.prompt, whole)
            text = self._cache().get(key) if len(whole) == len(hashes) else None
            if text is not None:
                found[example.id] = text
                cut |= {example.id} if self._cache().cut(key) else set()
        if found:
            self._part.add(name, found, cut=cut, from_cache=True)
            logger.info("%s: %d of %d answers taken from earlier runs (generation.reuse)", name, len(found), len(examples))
        return [e for e in examples if e.id not in found]


class _Tally:
    """Counts answers and losses of a task on this process, and tells now and then."""

    def __init__(self, name: str, total: int, *, of: int, max_skipped: float) -> None:
        """Start to count ``total`` questions of a task of ``of``."""
        self.answered, self._lost = 0, 0
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


def check_length(name: str, rows: Sequence[Planned], max_new_tokens: int, lm: Any) -> None:
    """Look before hours of work whether the longest question fits the language model.

    Args:
        name: The task's name.
        rows: Its questions.
        max_new_tokens: Longest answer.
        lm: Config of the language model.

    Raises:
        InputError: It has no position for the answer's last token. One with rotary positions goes on, worse and worse; the log
            says so.
    """
    longest, have = max(rows, key=lambda row: row.length), max_positions(lm)
    need = longest.length + max_new_tokens
    if need <= have:
        return
    what = f"question {longest.example.id!r} and its answer may take {need} tokens, the language model is made for {have}"
    if getattr(lm, "rope_parameters", None) is None:
        mend = "lower generation.max_new_tokens, or ask in fewer words"
        raise InputError(what, where=name, mend=mend)
    logger.warning("%s: %s", name, what)


def _hash_all(pictures: Sequence[Picture], *, max_bytes: int, max_pixels: int, between: Callable[[], None]) -> list[str | None]:
    """Hash of each picture's bytes, None of one that this run could not use; in threads, as most of it is waiting for a disk."""

    def one(picture: Picture) -> str | None:
        try:
            data = picture.read(max_bytes)
            # An earlier run may have had a higher limit; this one must not depend on what that one left behind.
            open_picture(data, max_pixels=max_pixels)
        except SampleError:
            return None
        return content_hash(data)

    found: list[str | None] = []
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(pictures), _AT_ONCE):
            # Tens of thousands of pictures on a slow disk take longer than a scheduler waits after its signal.
            between()
            found += pool.map(one, pictures[start : start + _AT_ONCE])
    return found
