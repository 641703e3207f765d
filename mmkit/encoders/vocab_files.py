"""Vocabularies out of files: Hugging Face tokenizers (local or from the hub), SentencePiece models, word lists."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import tokenizers

from mmkit.encoders.vocab import ClipVocabulary, Vocabulary
from mmkit.encoders.words import WordList
from mmkit.errors import InputError

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FILE_SUFFIXES = (".json", ".model", ".txt")
_MEND = "use clip, a tokenizer folder, a tokenizer.json, a words file, a .model, or a name of the Hugging Face hub"


class TokenizerFile:
    """A Hugging Face ``tokenizer.json``; tokens marked special there are not labels."""

    kind = "tokenizer.json"

    def __init__(self, path: Path) -> None:
        """Open the file; truncation and padding it may ask for are switched off."""
        self.path = path
        # tokenizers raises a bare Exception for a bad file, which must not be caught: look at the file first.
        if "model" not in _read_object(path):
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
        # As a label, unknown would stand for everything that the model cannot spell.
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


def open_vocabulary(name: str) -> Vocabulary:
    """Find out what a name means and open it.

    Args:
        name: ``clip``; a path of a tokenizer folder, ``tokenizer.json``, words file or SentencePiece ``.model``; or the name of
            a repository of the Hugging Face hub with a ``tokenizer.json``.

    Raises:
        InputError: If there is no such vocabulary, or the file is none.
    """
    if name == "clip":
        return _clip()
    path = Path(name)
    if path.is_dir():
        found = next((file for file in [path / "tokenizer.json", *sorted(path.glob("*.model"))] if file.is_file()), None)
        if found is None:
            raise InputError("no tokenizer.json or .model in this folder", where=f"labels {name}", mend=_MEND)
        path = found
    # A local path goes first: no name on the hub can take the place of a folder of the user's.
    elif not path.is_file():
        path = _from_hub(name)
    if path.suffix == ".model":
        return SentencePieceModel(path)
    content = _read_object(path)
    return WordList(path, content) if content.get("kind") == WordList.kind else TokenizerFile(path)


@functools.cache
def _clip() -> ClipVocabulary:
    """The CLIP vocabulary, read once a process."""
    return ClipVocabulary()


def _from_hub(name: str) -> Path:
    """The ``tokenizer.json`` of a hub repository, in the local cache."""
    where = f"labels {name}"
    # A mistyped path must not become a question to the hub and its answer about a repository.
    if not _HUB_NAME.fullmatch(name) or name.endswith(_FILE_SUFFIXES):
        raise InputError("no such vocabulary", where=where, mend=_MEND)
    # Imported here: only names of the hub need it.
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(name, "tokenizer.json"))
    # LocalEntryNotFoundError and GatedRepoError before the classes they belong to.
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = "which is not in the local cache, and the hub was not reached"
        raise InputError("no such vocabulary", where=where, mend=f"{_MEND} ({why}: check network and HF_HUB_OFFLINE)") from error
    except errors.EntryNotFoundError as error:
        mend = "take another, or download its SentencePiece .model and name that file"
        raise InputError("this hub repository has no tokenizer.json", where=where, mend=mend) from error
    except errors.GatedRepoError as error:
        mend = "accept them on its page and log in with `hf auth login`"
        raise InputError("this hub repository asks you to accept its terms", where=where, mend=mend) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise InputError("no such vocabulary, and no such repository on the hub", where=where, mend=_MEND) from error
    except OSError as error:
        what = f"tokenizer.json cannot be fetched ({' '.join(str(error).split())})"
        raise InputError(what, where=where, mend="check the network, or name a local file") from error


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"not readable JSON ({error})", where=path, mend="give a tokenizer.json") from error
    if not isinstance(content, dict):
        raise InputError("JSON, but no tokenizer", where=path, mend="give a tokenizer.json")
    return content
