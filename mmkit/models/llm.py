"""Causal language models and tokenizers: from the hub, from a folder, or small random ones for the demo and the tests.

A language model comes either by name (weights and all) or as a configuration with random weights. The two tokenizer
trainers give what the two published recipes use: GPT-2's byte-level BPE (ClipCap) and a SentencePiece BPE with byte
fallback as Llama's (LLaVA). Their folders open with ``AutoTokenizer`` in a process without mmkit.
"""

from __future__ import annotations

import difflib
import io
import logging
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mmkit.errors import InputError

log = logging.getLogger(__name__)

GPT2_EOS = "<|endoftext|>"
_HUB_MEND = "give a local folder, or download it first (`hf download NAME`) and unset HF_HUB_OFFLINE"


def lost_settings(config: Any) -> list[str]:
    """What makes a language model's logits more than a matrix times its last hidden state (Gemma 2, Cohere, Granite)."""
    # At their neutral value nothing is lost.
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    return [name for name in names if getattr(config, name, None) not in (None, 1, 1.0)]


def max_positions(config: Any) -> int:
    """Length of the sequences that a language model was made for; beyond it GPT-2 has no position, and others are at a loss."""
    return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """The torch dtype behind a recipe's word ("bfloat16", "bf16", ...)."""
    # "no" is Accelerate's word for no mixed precision.
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "no": "float32"}
    if dtype is None:
        return torch.float32
    found = getattr(torch, short.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    # getattr finds any name in torch ("nn", "load"), so the type is what tells.
    if not isinstance(found, torch.dtype):
        raise InputError(f"unknown dtype {dtype!r}", mend="use float32, bfloat16 or float16")
    return found


def llm_config(config: dict[str, Any], *, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedConfig:
    """Configuration of a language model from a recipe's mapping, every key checked.

    Args:
        config: ``model_type`` and any fields of that type's configuration.
        tokenizer: Fills vocabulary size and the special ids where ``config`` does not give them.

    Returns:
        The configuration object.

    Raises:
        InputError: For an unknown model type or an unknown field (transformers itself would keep the typo).
    """
    fields = dict(config)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise InputError("the LLM config has no model_type", mend="add model_type: llama (or gpt2, qwen2, ...)")
    try:
        # With its defaults, only to learn which fields there are.
        default = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise InputError(f"transformers knows no model_type {model_type!r}", mend="use llama, gpt2, ...") from error
    # attribute_map: other names of the same fields, such as GPT-2's hidden_size for n_embd.
    known = set(default.to_dict()) | set(default.attribute_map)
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"see transformers' {type(default).__name__}"
            raise InputError(f"unknown field {key!r} of a {model_type} config", mend=hint)
    if tokenizer is not None:
        # len counts added tokens too, tokenizer.vocab_size does not; an id beyond the embeddings is an index error.
        fields.setdefault("vocab_size", len(tokenizer))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            fields.setdefault(name, getattr(tokenizer, name))
    return AutoConfig.for_model(model_type, **fields)


def build_llm(
    name: str | None,
    *,
    config: dict[str, Any] | None = None,
    pretrained: bool = True,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    empty: bool = False,
) -> PreTrainedModel:
    """A causal language model by name or from a configuration.

    Args:
        name: Hub name or local folder; None to build from ``config``.
        config: ``{"model_type": "llama", "hidden_size": 64, ...}`` for random weights.
        pretrained: With a name: load its weights (True) or only its shape (False).
        dtype: Of the weights; float32 if None.
        seed: Of random weights; the global generators are left as they were.
        tokenizer: Fills vocabulary size and special ids of a ``config``.
        empty: On the meta device: shapes without weights, for a process that is given them later.

    Returns:
        The model, on the CPU unless empty, in eval mode.

    Raises:
        InputError: Both or neither of ``name`` and ``config``, an unknown field, or a name that cannot be opened.
    """
    # Neither wins over the other: a recipe that inherits a name and adds a config would train something unexpected.
    if (name is None) == (config is None):
        raise InputError("an LLM needs either a name or a config", mend="give exactly one of the two in the recipe")
    kind = _dtype(dtype)
    if name is not None:
        try:
            if pretrained and not empty:
                # from_pretrained returns the model in eval mode.
                return AutoModelForCausalLM.from_pretrained(name, dtype=kind)
            made = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            # The first line: the rest is advice about the hub that mend says better.
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"cannot open this language model ({reason})", where=name, mend=_HUB_MEND) from error
    else:
        assert config is not None
        made = llm_config(config, tokenizer=tokenizer)
    if empty:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(made, dtype=kind).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # eval by hand: from_config leaves training mode on, and dropout would make the model look random.
        return AutoModelForCausalLM.from_config(made, dtype=kind).eval()


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Open a tokenizer by hub name or folder.

    Raises:
        InputError: When it cannot be opened (offline, missing folder) or is not a fast one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"cannot open this tokenizer ({reason})", where=name_or_path, mend=_HUB_MEND) from error
    # Labels come from the Rust tokenizer's own settings (mmkit.data.conversations), which slow ones do not have.
    if not tokenizer.is_fast:
        raise InputError("only tokenizers with a tokenizer.json are supported", where=name_or_path)
    return tokenizer


def _clean_texts(texts: Iterable[str], folder: Path) -> list[str]:
    """Sorted unique non-blank texts, so that a tokenizer does not depend on the order or the repeats of its input."""
    unique = sorted({text.strip() for text in texts} - {""})
    if not unique:
        raise InputError("no text to train a tokenizer on", where=folder, mend="check the caption file")
    return unique


def train_bpe_tokenizer(texts: Iterable[str], folder: str | Path, *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train and save a byte-level BPE tokenizer as GPT-2's: one special token, ``<|endoftext|>``, for all purposes.

    Args:
        texts: Training texts; order and repeats do not matter.
        folder: Where to save it.
        vocab_size: Upper bound of the vocabulary; at least 257 (all bytes and the special token).

    Returns:
        The tokenizer; padding is with the end token, so masks must come from lengths, never from ids.
    """
    folder = Path(folder)
    # 256 bytes and the end token.
    if vocab_size < 257:
        raise InputError(f"vocab_size {vocab_size} has no room for all bytes", where=folder, mend="use 257 or more")
    backend = Tokenizer(models.BPE())
    # No space in front, as GPT-2: the first word of a caption is another token than the same word further on.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(GPT2_EOS, special=True)],
        # All bytes from the start: otherwise only those in the texts get a token, and others would be dropped in silence.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_clean_texts(texts, folder), trainer)
    special = {"bos_token": GPT2_EOS, "eos_token": GPT2_EOS, "unk_token": GPT2_EOS, "pad_token": GPT2_EOS}
    # Clean-up would rewrite decoded text (" ." to "."), and the ids would no longer read back as it.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _train_sentencepiece(texts: list[str], vocab_size: int) -> bytes:
    """The serialised SentencePiece BPE model; Llama's settings (identity normalisation, byte fallback, split digits)."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        # Identity: ids must read back as the very text, spaces and full-width letters included.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _merges(processor: sentencepiece.SentencePieceProcessor) -> list[tuple[str, str]]:
    """Merge rules of a SentencePiece BPE model, best first: every split of a learnt piece into two learnt pieces.

    Pieces are numbered in the order they were learnt, so a piece's id is the rank of its merges. Control and byte
    pieces take no part: no spelling of ``</s>`` in a text can merge into the control token.
    """
    learnt: dict[str, int] = {}
    for index in range(processor.get_piece_size()):
        # Byte pieces are spelt <0x41>: no merge may build them out of these characters.
        if not (processor.is_control(index) or processor.is_byte(index) or processor.is_unknown(index)):
            learnt[processor.id_to_piece(index)] = index
    rules = [
        (rank, learnt[piece[:cut]], learnt[piece[cut:]], piece[:cut], piece[cut:])
        for piece, rank in learnt.items()
        # Every split, not only the one that was learnt: SentencePiece merges by piece, whatever two parts it comes from.
        for cut in range(1, len(piece))
        if piece[:cut] in learnt and piece[cut:] in learnt
    ]
    # By rank first, then by the ids of the parts: a fixed order where one piece has several splits.
    return [(left, right) for *_, left, right in sorted(rules)]


def train_sentencepiece_tokenizer(texts: Iterable[str], folder: str | Path, *, vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a SentencePiece BPE model with byte fallback and save it as a Llama tokenizer.

    The folder holds ``tokenizer.model`` (for SentencePiece) and ``tokenizer.json`` (for everybody else). The latter is
    made here from the pieces: transformers reads ``tokenizer.model`` only where protobuf is installed.

    Args:
        texts: Training texts; order and repeats do not matter.
        folder: Where to save it.
        vocab_size: Wished size; lowered, with a note, to what the texts can fill.

    Returns:
        The tokenizer: ``<unk>`` 0 (also the padding), ``<s>`` 1 (put in front), ``</s>`` 2.
    """
    folder = Path(folder)
    unique = _clean_texts(texts, folder)
    try:
        model = _train_sentencepiece(unique, vocab_size)
    except RuntimeError as error:
        # SentencePiece names the largest size the texts can fill; small demo corpora run into it.
        largest = re.search(r"set it to a value <= (\d+)", str(error))
        if largest is None:
            raise InputError(f"SentencePiece cannot train on these texts ({error})", where=folder) from error
        log.info("the texts fill %s pieces, not %d", largest.group(1), vocab_size)
        model = _train_sentencepiece(unique, int(largest.group(1)))
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {processor.id_to_piece(index): index for index in range(processor.get_piece_size())}
    # Padding with unk, as LLaVA does: Llama has no padding token, and masks come from lengths.
    tokenizer = LlamaTokenizer(vocab=vocab, merges=_merges(processor), legacy=False, add_bos_token=True, pad_token="<unk>")
    folder.mkdir(parents=True, exist_ok=True)
    # SentencePiece's own file, for programs that read no tokenizer.json.
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer.save_pretrained(folder)
    return tokenizer
