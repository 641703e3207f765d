"""Captions as sets of subword labels."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmkit.encoders.vocab import ClipVocabulary, SentencePieceModel, TokenizerFile, Vocabulary
from mmkit.errors import InputError


class CaptionLabels:
    """Turns captions into sorted sets of token ids, special tokens left out.

    Attributes:
        name: The vocabulary as the user named it.
        vocab_size: Number of labels V, that is rows of the head; 49,408 for ``clip``.
        context_length: Length limit of the reference, or None.
        file: The vocabulary file.
    """

    def __init__(self, name: str = "clip", *, context_length: int | None = None) -> None:
        """Open a vocabulary.

        Args:
            name: ``clip``; or a path: a folder of a Hugging Face tokenizer, a ``tokenizer.json``, or a SentencePiece
                ``.model``.
            context_length: Keep the first ``context_length - 2`` tokens of a caption, as the reference does with 77
                (two places go to start and end); None keeps all.

        Raises:
            InputError: If there is no such vocabulary, or the file is none.
        """
        if context_length is not None and context_length < 3:
            raise InputError(f"context_length {context_length} leaves no label", mend="use at least 3, or null")
        self.name = str(name)
        self.context_length = context_length
        self._vocabulary = _open(self.name)
        self.vocab_size = self._vocabulary.size
        self.file = self._vocabulary.path

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """Label captions.

        Args:
            captions: B captions; an empty one has no labels.

        Returns:
            B lists of ids, each sorted and without repeats.
        """
        assert not isinstance(captions, str), "encode takes a list of captions"
        # Truncation comes before the set, on tokens in order, as in the reference.
        keep = None if self.context_length is None else self.context_length - 2
        return [sorted(set(self._vocabulary.encode(caption)[:keep])) for caption in captions]

    def token(self, label: int) -> str:
        """The token of an id as the vocabulary spells it, such as ``bus</w>``."""
        return self._vocabulary.token(label)

    def decode_tag(self, label: int) -> str:
        """The token of an id as a word for people, such as ``bus``; pieces carry a hyphen where the word goes on."""
        return self._vocabulary.word(label)

    def describe(self) -> dict[str, Any]:
        """What is saved beside a model: enough to open the vocabulary again and to see that it is the same."""
        return {
            "kind": self._vocabulary.kind,
            "name": self.name,
            "vocab_size": self.vocab_size,
            "context_length": self.context_length,
            "sha256": hashlib.sha256(self.file.read_bytes()).hexdigest(),
        }


def _open(name: str) -> Vocabulary:
    """Find out what a name means."""
    if name == "clip":
        return _clip()
    path = Path(name)
    candidates = [path / "tokenizer.json", *sorted(path.glob("*.model"))] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return SentencePieceModel(candidate) if candidate.suffix == ".model" else TokenizerFile(candidate)
    what = "no tokenizer.json or .model in this folder" if path.is_dir() else "no such vocabulary"
    raise InputError(what, where=f"labels {name}", mend="use clip, a tokenizer folder, a tokenizer.json or a .model")


@functools.cache
def _clip() -> ClipVocabulary:
    """The CLIP vocabulary, read once a process."""
    return ClipVocabulary()
