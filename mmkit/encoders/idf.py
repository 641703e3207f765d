"""Inverse document frequency of the labels, counted in whole numbers while training or beforehand over a corpus."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmkit.encoders.ragged import first_in_row, row_of_label
from mmkit.errors import InputError

_TABLE = "mmkit-idf"
_MEND = "write the table again with `mmkit data inspect --idf`"


class OnlineIDF(nn.Module):
    """Document counts of everything seen so far, and the weights that follow from them.

    ``w_c = ln((N + 1) / (df_c + 1))`` with N captions seen and df_c of them containing c. This is x-cls/superclass'
    ``log((n + 1/Bg) / (cap_fq_c + 1/Bg))`` (open_clip/loss.py:441-447) with counts instead of running means; the paper
    (arXiv 2411.03313, section 3.2) writes ``log(N / (1 + df_c))``. A label in every caption weighs 0, none weighs less.

    A row without labels is no document: it counts neither in df nor in N, as it does not count in the loss.

    A frozen one keeps the counts it was given (a corpus table, see `load_table`) and takes no others.

    The counts are int64 buffers: exact in any order of summation, so 1 x 8 processes equal 8 x 1, and untouched by
    ``.to(torch.bfloat16)``. Nothing here knows of ranks: sum `counts` over them, then `absorb` the sum.
    """

    df: Tensor
    n: Tensor

    def __init__(self, vocab_size: int, df: Tensor | None = None, n: int | None = None, frozen: bool = False) -> None:
        """Start with nothing seen (all weights 0), or with the counts of a table.

        Args:
            vocab_size: V.
            df: Captions that contain each label, integer[V].
            n: Captions that have labels; goes with `df`.
            frozen: Count no further.
        """
        super().__init__()
        assert (df is None) == (n is None), "df and n go together"
        assert df is not None or not frozen, "a frozen IDF without counts would weigh every label 0"
        assert df is None or df.shape == (vocab_size,), "df must hold a count for every label"
        self.vocab_size, self.frozen = vocab_size, frozen
        # Buffers, so that they travel with state_dict and the IDF survives a resume.
        self.register_buffer("df", torch.zeros(vocab_size, dtype=torch.int64) if df is None else df.to(torch.int64, copy=True))
        self.register_buffer("n", torch.tensor([n or 0], dtype=torch.int64))

    def counts(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Count one local batch without changing the state.

        Args:
            ids: i64[L] labels; repeats in a row count once.
            offsets: i64[B + 1].

        Returns:
            int64[V + 1]: rows that contain each label, then the number of rows that have labels.
        """
        assert not self.frozen, "a frozen IDF takes no counts"
        rows = row_of_label(offsets, ids.numel())
        # scatter_add and not bincount: no host synchronisation on CUDA, and exact for integers in any order.
        # N rides along as the last entry, so that one collective sums both (the reference has two, both blocking).
        counted = ids.new_zeros(self.vocab_size + 1)
        counted[: self.vocab_size].scatter_add_(0, ids, first_in_row(ids, rows, self.vocab_size).long())
        # Labelled rows and not rows: N has to count the same documents as df.
        counted[-1] = (offsets.diff() > 0).sum()
        return counted

    @torch.no_grad()
    def absorb(self, counts: Tensor) -> None:
        """Add counts (of one batch, or summed over ranks) to the state.

        Args:
            counts: int64[V + 1] from `counts`.
        """
        assert not self.frozen, "a frozen IDF takes no counts"
        assert counts.shape == (self.vocab_size + 1,), f"counts {tuple(counts.shape)} for {self.vocab_size} labels"
        # Made on the device of the batch, which need not be that of the module.
        counts = counts.to(self.df.device)
        self.df += counts[:-1]
        self.n += counts[-1:]

    def update(self, ids: Tensor, offsets: Tensor) -> None:
        """Count one global batch: ids i64[L], offsets i64[B + 1]."""
        self.absorb(self.counts(ids, offsets))

    def weights(self) -> Tensor:
        """The weights now: float32[V], computed in float64, never negative."""
        # float64: differences of counts beyond 2^24 samples are lost in float32 (x-cls keeps float64 too).
        return torch.log((self.n.double() + 1.0) / (self.df.double() + 1.0)).float()


def row_normalised(weights: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """Weights of ragged labels that sum to 1 in every row.

    As the reference's K-hot matrix, labels are sets: repeats of an id in a row get 0. A row whose weights sum to 0 (all
    its labels are in every caption seen so far) keeps zeros and adds nothing to the loss, as ``F.normalize(p=1)`` leaves
    it (open_clip/loss.py:437).

    Args:
        weights: float[V], not negative.
        ids: i64[L].
        offsets: i64[B + 1].

    Returns:
        float32[L].
    """
    # Collate functions leave the offsets on the CPU where other code wants them; the work is where the ids are.
    offsets = offsets.to(ids.device)
    rows = row_of_label(offsets, ids.numel())
    raw = weights.float()[ids] * first_in_row(ids, rows, weights.numel())  # float32[L]
    sums = raw.new_zeros(offsets.numel() - 1).index_add_(0, rows, raw)
    # The eps of F.normalize: a row of zeros stays zeros instead of NaN.
    return raw / sums[rows].clamp_min(1e-12)


def save_table(
    file: str | Path,
    df: Tensor,
    n: int,
    *,
    sha256: str,
    name: str = "",
    source: str = "",
    dropped: Iterable[int] = (),
    context_length: int | None = None,
) -> None:
    """Write document counts of a corpus; complete or absent at every time.

    Args:
        file: Where to (safetensors: whole numbers, and what they count as metadata).
        df: Captions that contain each label, integer[V].
        n: Captions that have labels.
        sha256: Of the vocabulary, see `CaptionLabels.describe`.
        name: Of the vocabulary, for messages.
        source: Fingerprint of the corpus.
        dropped: Labels that were not counted (stop words): their df says nothing.
        context_length: Length at which captions were cut before they were counted, or None.
    """
    # float32 counts in steps of 1 up to 2^24 only, about 17 million captions.
    assert not df.dtype.is_floating_point, "counts are whole numbers"
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, for a rename that is atomic; the pid keeps two writers apart.
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    tensors = {"df": df.to("cpu", torch.int64).contiguous(), "n": torch.tensor([n], dtype=torch.int64)}
    try:
        metadata = {"kind": _TABLE, "sha256": sha256, "vocabulary": name, "source": source}
        # As JSON: safetensors metadata holds strings only.
        metadata |= {"dropped": json.dumps(sorted(dropped)), "context_length": json.dumps(context_length)}
        save_file(tensors, temporary, metadata=metadata)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def load_table(
    file: str | Path,
    *,
    sha256: str,
    vocab_size: int,
    dropped: Collection[int] = (),
    context_length: int | None = None,
) -> tuple[Tensor, int]:
    """Read document counts.

    Args:
        file: What `save_table` wrote.
        sha256: Of the vocabulary in use.
        vocab_size: V of the vocabulary in use.
        dropped: Labels left out in use (stop words).
        context_length: Length at which captions are cut in use, or None.

    Returns:
        df i64[V] and n.

    Raises:
        InputError: If there is no such table, it is damaged, counts the labels of another vocabulary, or left labels uncounted
            that are in use: a label with df = 0 would weigh more than any other.
    """
    if not Path(file).is_file():
        raise InputError("no such IDF table", where=file, mend=_MEND)
    try:
        # Not load_file, which gives no metadata.
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise InputError(f"cannot be read ({error})", where=file, mend=_MEND) from error
    if metadata.get("kind") != _TABLE or set(tensors) != {"df", "n"}:
        raise InputError("safetensors, but no IDF table", where=file, mend=_MEND)
    df, n = tensors["df"], int(tensors["n"])
    # By the hash and not by the size alone: 49,408 labels may be those of another vocabulary.
    if metadata.get("sha256") != sha256 or df.shape != (vocab_size,):
        theirs = f"{metadata.get('vocabulary') or 'unnamed'} ({df.numel()} labels, sha256 {str(metadata.get('sha256'))[:12]})"
        what = f"counts the vocabulary {theirs}, not the one in use ({vocab_size} labels, sha256 {sha256[:12]})"
        raise InputError(what, where=file, mend=_MEND)
    # A table edited by hand or cut by another tool would give weights below zero or infinite ones.
    if df.dtype != torch.int64 or not 0 <= int(df.min()) <= int(df.max()) <= n:
        raise InputError(f"counts must be whole numbers from 0 to the {n} captions", where=file, mend=_MEND)
    # Another list of stop words that is longer than the table's does no harm: what is counted and not used is ignored.
    if missing := set(json.loads(metadata.get("dropped", "[]"))) - set(dropped):
        what = f"was counted without {len(missing)} labels (stop words) that are in use here"
        raise InputError(what, where=file, mend=f"use the same data.stop_words, or {_MEND}")
    limit = json.loads(metadata.get("context_length", "null"))
    # The other way round is harmless: counts of whole captions weigh cut ones a little lower, none is unknown.
    if limit is not None and (context_length is None or context_length > limit):
        what = f"was counted on captions cut at {limit} tokens, here they are cut at {context_length or 'no length'}"
        raise InputError(what, where=file, mend=f"use data.context_length={limit}, or {_MEND}")
    return df, n
