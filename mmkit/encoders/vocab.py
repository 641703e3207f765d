"""The subword vocabularies behind `CaptionLabels`: CLIP's BPE, Hugging Face tokenizer files, SentencePiece models."""

from __future__ import annotations

import gzip
import html
import importlib.util
import json
from pathlib import Path
from typing import Any, Protocol

import ftfy
import regex  # type: ignore[import-untyped]
import tokenizers

from mmkit.errors import InputError

# open_clip/tokenizer.py:167-170. regex, not the Rust expression engine: the two follow different Unicode versions and
# fold case differently ("'ſ" is "'s" here), and the ids must be the same for every text.
_SPECIAL = ("<start_of_text>", "<end_of_text>")
_WORDS = regex.compile("|".join(_SPECIAL) + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
_CACHE_LIMIT = 1 << 20


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


class ClipVocabulary:
    """OpenAI CLIP's lower-cased BPE, equal id for id to open_clip's pure Python ``SimpleTokenizer``."""

    kind = "clip"

    def __init__(self) -> None:
        """Read the merges that open_clip ships, without importing open_clip (which would import torchvision)."""
        spec = importlib.util.find_spec("open_clip")
        assert spec is not None and spec.submodule_search_locations, "open_clip_torch is a dependency of mmkit"
        self.path = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
        merges = [(first, second) for first, second in map(str.split, _merge_lines(self.path))]
        self._byte_text = _bytes_to_unicode()
        units = list(self._byte_text.values())
        self._tokens = [*units, *(unit + "</w>" for unit in units), *("".join(pair) for pair in merges), *_SPECIAL]
        self.size = len(self._tokens)
        self._bpe = tokenizers.models.BPE(
            vocab={token: index for index, token in enumerate(self._tokens)},
            merges=merges,
            end_of_word_suffix="</w>",
        )
        # Captions repeat their words, so a dictionary of whole words is faster than any tokenizer.
        self._cache: dict[str, tuple[int, ...]] = dict.fromkeys(_SPECIAL, ())

    def encode(self, text: str) -> list[int]:
        """Clean as open_clip's ``clean='lower'``, split into words, look up or merge each."""
        return [label for word in _WORDS.findall(clean_lower(text)) for label in self._word_ids(word)]

    def _word_ids(self, word: str) -> tuple[int, ...]:
        """Ids of one word; special tokens written out in a caption are not labels and give none."""
        ids = self._cache.get(word)
        if ids is None:
            text = "".join(self._byte_text[byte] for byte in word.encode("utf-8"))
            ids = tuple(token.id for token in self._bpe.tokenize(text))
            if len(self._cache) < _CACHE_LIMIT:
                self._cache[word] = ids
        return ids

    def token(self, label: int) -> str:
        """The token in byte-level spelling, ``</w>`` at a word's end."""
        return self._tokens[label]

    def word(self, label: int) -> str:
        """The token as text: ``bus``, or ``bu-`` for a piece inside a word."""
        text = self._tokens[label].removesuffix("</w>")
        if text not in _SPECIAL:
            to_byte = {unit: byte for byte, unit in self._byte_text.items()}
            text = bytes(to_byte[unit] for unit in text).decode("utf-8", errors="replace")
        return text if self._tokens[label].endswith(("</w>", *_SPECIAL)) else f"{text}-"


class TokenizerFile:
    """A Hugging Face ``tokenizer.json``; tokens marked special there are not labels."""

    kind = "tokenizer.json"

    def __init__(self, path: Path) -> None:
        """Open the file; truncation and padding it may ask for are switched off."""
        self.path = path
        # tokenizers raises a bare Exception for a bad file, which must not be caught: look at the file first.
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"not readable JSON ({error})", where=path, mend="give a tokenizer.json") from error
        if not isinstance(content, dict) or "model" not in content:
            raise InputError("JSON, but no tokenizer", where=path, mend="give a tokenizer.json")
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special = {index for index, added in self._tokenizer.get_added_tokens_decoder().items() if added.special}
        # Ids may have holes, and the head needs a row for the largest.
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, special ones dropped even if written out in it."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [label for label in ids if label not in self._special]

    def token(self, label: int) -> str:
        """The token as the file spells it; an unused id is empty."""
        return self._tokenizer.id_to_token(label) or ""

    def word(self, label: int) -> str:
        """The token as text; WordPiece's ``##ing`` becomes ``-ing``."""
        token = self.token(label)
        if token.startswith("##"):
            return f"-{token[2:]}"
        text: str = self._tokenizer.decode([label], skip_special_tokens=False)
        return text.strip() or token


class SentencePieceModel:
    """A SentencePiece ``.model``; control, unknown and unused pieces are not labels."""

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        """Open the model."""
        # Imported here: the package is needed for these models only, and its import costs time.
        import sentencepiece

        self.path = path
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InputError("not a SentencePiece model", where=path, mend="give a .model file") from error
        self.size = int(self._model.get_piece_size())
        model = self._model
        self._special = {i for i in range(self.size) if model.is_control(i) or model.is_unknown(i) or model.is_unused(i)}

    def encode(self, text: str) -> list[int]:
        """Piece ids of the text."""
        return [label for label in self._model.encode(text) if label not in self._special]

    def token(self, label: int) -> str:
        """The piece, with the word-start mark."""
        return str(self._model.id_to_piece(label))

    def word(self, label: int) -> str:
        """The piece as text; one that does not start a word carries a hyphen in front."""
        piece = self.token(label)
        return piece[1:] if piece.startswith("\u2581") and len(piece) > 1 else f"-{piece}"


def clean_lower(text: str) -> str:
    """Mend and normalise a caption as open_clip does: ftfy, HTML entities twice, one space, lower case.

    Args:
        text: Any caption.

    Returns:
        The cleaned caption.
    """
    # ftfy takes most of the time and changes nothing in printable ASCII but HTML entities.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _merge_lines(path: Path) -> list[str]:
    """The 48,894 merges that CLIP uses of the longer file (open_clip/tokenizer.py:148)."""
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        return lines.read().split("\n")[1 : 49152 - 256 - 2 + 1]


def _bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte, in CLIP's order of ids (open_clip/tokenizer.py:33-55)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
