"""Captions as sets of subword labels."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkit.encoders.chunks import ChunkTable, clean_lines
from mmkit.encoders.stopwords import read_stop_words, stop_labels
from mmkit.encoders.vocab import ChunkedVocabulary
from mmkit.encoders.vocab_files import open_vocabulary
from mmkit.errors import InputError

# Below this many captions the fixed cost of array operations is more than a Python loop takes.
_FEW = 24


class CaptionLabels:
    """Turns captions into sorted sets of token ids, special tokens left out.

    Attributes:
        name: The vocabulary as the user named it.
        vocab_size: Number of labels V, that is rows of the head; 49,408 for ``clip``.
        context_length: Length limit of the reference, or None.
        stop_words: The choice of words that are no labels, or None.
        stop_word_list: These words.
        dropped: Their ids.
        file: The vocabulary file.
        start_of_text: Id of the token a text tower begins with; None but for ``clip``.
        end_of_text: Id of the token a text tower ends with; None but for ``clip``.
    """

    def __init__(
        self,
        name: str = "clip",
        *,
        context_length: int | None = None,
        stop_words: str | Sequence[str] | None = None,
    ) -> None:
        """Open a vocabulary.

        Args:
            name: ``clip``; a path: a folder of a Hugging Face tokenizer, a ``tokenizer.json``, a SentencePiece ``.model``, or a
                words file; or a name of the Hugging Face hub, such as ``bert-base-uncased``.
            context_length: Keep the first ``context_length - 2`` tokens of a caption, as the reference does with 77
                (two places go to start and end); None keeps all.
            stop_words: Words that are no labels: ``english``, a file with a word a line, or the words; None: all are.

        Raises:
            InputError: If there is no such vocabulary or file, or it is none.
        """
        if context_length is not None and context_length < 3:
            raise InputError(f"context_length {context_length} leaves no label", mend="use at least 3, or null")
        self.name = str(name)
        self.context_length = context_length
        vocabulary = self._vocabulary = open_vocabulary(self.name)
        self.vocab_size = vocabulary.size
        self.file = vocabulary.path
        # Kept as words too: a model that is opened elsewhere must not need the file.
        self.stop_word_list = words = () if stop_words is None else read_stop_words(stop_words)
        # A file of the user's may be gone when the model is opened again: its words are what is kept.
        self.stop_words = stop_words if stop_words in (None, "english") else words
        self.dropped = stop_labels(words, vocabulary)
        # Only CLIP's vocabulary has them; a text tower is built for no other.
        self.start_of_text: int | None = getattr(vocabulary, "start_of_text", None)
        self.end_of_text: int | None = getattr(vocabulary, "end_of_text", None)
        # Truncation comes before the set, on tokens in order, as in the reference.
        self._keep = None if context_length is None else context_length - 2
        # Only where tokens never cross a space are the ids of chunks those of the caption.
        self._table: ChunkTable | None = None
        # Without a table any number would do.
        self._block = 1024
        if isinstance(vocabulary, ChunkedVocabulary):
            self._table = ChunkTable(vocabulary.chunk_ids, vocabulary.size, keep=self._keep, dropped=self.dropped)
            # Longer blocks do not fit the table's keys, in which row and id share 31 bits.
            self._block = self._table.max_rows

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """Label captions.

        Args:
            captions: B captions; an empty one has no labels.

        Returns:
            B lists of ids, each sorted and without repeats.
        """
        # A string is a sequence of strings too, and each of its letters would be labelled without complaint.
        assert not isinstance(captions, str), "encode takes a list of captions"
        # For a few captions the arrays cost more than they save.
        if self._table is None or len(captions) < _FEW:
            return [self.encode_one(caption) for caption in captions]
        rows: list[list[int]] = []
        for begin in range(0, len(captions), self._block):
            found, offsets = self._encode_block(captions[begin : begin + self._block])
            ids, ends = found.tolist(), offsets.tolist()
            rows += [ids[start:end] for start, end in itertools.pairwise(ends)]
        return rows

    def encode_packed(self, captions: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Label captions into the ragged form of `mmkit.encoders.ragged`, without a list for each caption on the way.

        Args:
            captions: B captions.

        Returns:
            ids i64[L], sorted and without repeats in each row, and offsets i64[B + 1].
        """
        assert not isinstance(captions, str), "encode_packed takes a list of captions"
        blocks = [self._encode_block(captions[begin : begin + self._block]) for begin in range(0, len(captions), self._block)]
        lengths = [np.diff(offsets) for _, offsets in blocks]
        # Blocks have offsets of their own; their lengths joined give those of the whole.
        offsets = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
        # The empty array makes no captions at all a case like any other, and int64 of the table's int32.
        return np.concatenate([np.zeros(0, dtype=np.int64), *(ids for ids, _ in blocks)]), offsets

    def _encode_block(self, captions: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Ids of one block of captions and the offsets of its rows."""
        if self._table is not None and len(captions) >= _FEW:
            return self._table.encode(clean_lines(captions), len(captions))
        rows = [self.encode_one(caption) for caption in captions]
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return np.fromiter((label for row in rows for label in row), dtype=np.int64, count=int(offsets[-1])), offsets

    def encode_one(self, caption: str) -> list[int]:
        """Label one caption: ids, sorted and without repeats."""
        # Cut before the set is made: the limit is one of tokens in order, as in the reference.
        ids = self._vocabulary.encode(caption)[: self._keep]
        # Stop words leave after the cut: without them no word comes in that lay beyond it.
        return sorted(set(ids) - self.dropped) if self.dropped else sorted(set(ids))

    def tokens(self, caption: str) -> list[int]:
        """Token ids of a caption in order, for a text tower: repeats and stop words stay, special tokens are left out."""
        return self._vocabulary.encode(caption)

    def token(self, label: int) -> str:
        """The token of an id as the vocabulary spells it, such as ``bus</w>``."""
        return self._vocabulary.token(label)

    def decode_tag(self, label: int) -> str:
        """The token of an id as a word for people, such as ``bus``; pieces carry a hyphen where the word goes on."""
        return self._vocabulary.word(label)

    def sha256(self) -> str:
        """Hash of the vocabulary file; stop words and length limit do not change it, for a head's rows are the same."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    def for_table(self) -> dict[str, Any]:
        """What an IDF table must agree with: keyword arguments of `mmkit.encoders.idf.load_table`."""
        return {
            "sha256": self.sha256(),
            "vocab_size": self.vocab_size,
            "dropped": self.dropped,
            "context_length": self.context_length,
        }

    def describe(self) -> dict[str, Any]:
        """What is saved beside a model: enough to open the vocabulary again and to see that it is the same."""
        stop_words = self.stop_words if self.stop_words is None or isinstance(self.stop_words, str) else list(self.stop_words)
        return {
            "kind": self._vocabulary.kind,
            "name": self.name,
            "vocab_size": self.vocab_size,
            "context_length": self.context_length,
            "stop_words": stop_words,
            "sha256": self.sha256(),
        }
