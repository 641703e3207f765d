"""What a vocabulary of caption labels is, and CLIP's BPE."""

from __future__ import annotations

import gzip
import html
import importlib.util
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Protocol

import ftfy
import regex  # type: ignore[import-untyped]
import tokenizers

# open_clip/tokenizer.py:167-170. regex, not the Rust expression engine: the two follow different Unicode versions and
# fold case differently ("'ſ" is "'s" here), and the ids must be the same for every text.
_SPECIAL = ("<start_of_text>", "<end_of_text>")
_WORDS = regex.compile("|".join(_SPECIAL) + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
# The reference's word cache has no bound, and grows in every loader worker over a billion captions.
_CACHE_LIMIT = 1 << 18
_LONGEST_CACHED = 64


class Vocabulary(Protocol):
    """What `CaptionLabels` needs of a vocabulary."""

    kind: str
    path: Path
    size: int

    def encode(self, text: str) -> list[int]:
        """Token ids in the order of the text, without special tokens."""
        ...

    def token(self, label: int) -> str:
        """The token as the vocabulary writes it."""
        ...

    def word(self, label: int) -> str:
        """The token for human eyes; a piece that continues inside a word carries a hyphen where it is open."""
        ...


class ChunkIds(dict[str, tuple[int, ...]]):
    """Ids of chunks seen so far; an unknown one is worked out when it is looked up."""

    def __init__(self, compute: Callable[[str], tuple[int, ...]]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, chunk: str) -> tuple[int, ...]:
        """Compute and remember; a full memory starts again, and the frequent chunks are back at once."""
        ids = self._compute(chunk)
        if len(chunk) <= _LONGEST_CACHED:
            if len(self) >= _CACHE_LIMIT:
                self.clear()
            self[chunk] = ids
        return ids


class ChunkedVocabulary:
    """A vocabulary of clean lower-case text whose tokens never reach across a space.

    So the ids of a caption are the ids of its chunks (what is between two spaces), and chunks repeat: a dictionary of them is
    faster than any tokenizer, and `mmkit.encoders.chunks` looks up all chunks of many captions at once.
    """

    def __init__(self) -> None:
        self._ids = ChunkIds(self.chunk_ids)

    def chunk_ids(self, chunk: str) -> tuple[int, ...]:
        """Ids of a chunk of clean lower-case text without white space."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Token ids in the order of the text, without special tokens."""
        clean = text.lower() if is_plain(text) else clean_lower(text)
        return list(chain.from_iterable(map(self._ids.__getitem__, clean.split())))


class ClipVocabulary(ChunkedVocabulary):
    """OpenAI CLIP's lower-cased BPE, equal id for id to open_clip's pure Python ``SimpleTokenizer``.

    Chunks give the same ids as whole captions: no alternative of the word pattern matches white space, and none looks around.
    """

    kind = "clip"

    def __init__(self) -> None:
        """Read the merges that open_clip ships, without importing open_clip (which would import torchvision)."""
        super().__init__()
        spec = importlib.util.find_spec("open_clip")
        assert spec is not None and spec.submodule_search_locations, "open_clip_torch is a dependency of mmkit"
        self.path = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
        merges = [(first, second) for first, second in map(str.split, _merge_lines(self.path))]
        self._byte_text = _bytes_to_unicode()
        units = list(self._byte_text.values())
        # This order is the order of the ids (open_clip/tokenizer.py:147-154).
        self._tokens = [*units, *(unit + "</w>" for unit in units), *("".join(pair) for pair in merges), *_SPECIAL]
        self.size = len(self._tokens)
        self.start_of_text, self.end_of_text = self.size - 2, self.size - 1
        self._bpe = tokenizers.models.BPE(
            vocab={token: index for index, token in enumerate(self._tokens)},
            merges=merges,
            end_of_word_suffix="</w>",
        )

    def chunk_ids(self, chunk: str) -> tuple[int, ...]:
        """Split a chunk into words and merge each; special tokens written out in a caption are not labels and give none."""
        return tuple(label for word in _WORDS.findall(chunk) if word not in _SPECIAL for label in self._merged(word))

    def _merged(self, word: str) -> list[int]:
        """Ids of one word, by the merges."""
        text = "".join(self._byte_text[byte] for byte in word.encode("utf-8"))
        return [token.id for token in self._bpe.tokenize(text)]

    def token(self, label: int) -> str:
        """The token in byte-level spelling, ``</w>`` at a word's end."""
        return self._tokens[label]

    def word(self, label: int) -> str:
        """The token as text: ``bus``, or ``bu-`` for a piece inside a word."""
        text = self._tokens[label].removesuffix("</w>")
        if text not in _SPECIAL:
            to_byte = {unit: byte for byte, unit in self._byte_text.items()}
            # A piece may end within a character of several bytes, which is no valid UTF-8.
            text = bytes(to_byte[unit] for unit in text).decode("utf-8", errors="replace")
        return text if self._tokens[label].endswith(("</w>", *_SPECIAL)) else f"{text}-"


def is_plain(text: str) -> bool:
    """Whether cleaning leaves a text as it is, but for spaces and case: ftfy and HTML entities change nothing in it."""
    return text.isascii() and text.isprintable() and "&" not in text


def clean_lower(text: str) -> str:
    """Mend and normalise a caption as open_clip does: ftfy, HTML entities twice, one space, lower case.

    Args:
        text: Any caption.

    Returns:
        The cleaned caption.
    """
    # ftfy takes most of the time.
    if not is_plain(text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _merge_lines(path: Path) -> list[str]:
    """The 48,894 merges that CLIP uses of the longer file (open_clip/tokenizer.py:148)."""
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        # The first line is a version. 49,152 counts the 256 bytes once; with their word-final twins V is 49,408.
        return lines.read().split("\n")[1 : 49152 - 256 - 2 + 1]


def _bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte, in CLIP's order of ids (open_clip/tokenizer.py:33-55)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
