"""What an assembled model's generation needs to know: padding, stop tokens, and settings that can be saved."""

from __future__ import annotations

from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

# Without do_sample these do nothing, and transformers refuses to save a config that has them changed and do_sample not:
# Vicuna's and Llama 2's published generation_config.json are such, and a run would end without a product.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def choose_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without padding token one that it has: the unknown token, else its end token.

    Llama, Mistral and GPT-2 have none. The unknown token is LLaVA's choice; Llama 3 and GPT-2 have none either, and get the end
    token. Neither is a danger: attention masks and labels come from lengths, never from ids, so an end token that is
    learnt and one that pads are told apart. A new token would cost a row in embeddings and head for nothing.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def settle_generation(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Bring a language model's generation settings into a state that can be saved and that knows every end.

    Args:
        model: With the ``generation_config`` of its language model.
        tokenizer: Its end token joins the list (instruct models name several: Llama 3's ``<|eot_id|>``, Qwen's
            ``<|im_end|>``); its padding token becomes the model's.
    """
    config = model.generation_config
    if not config.do_sample:
        for name in _SAMPLING:
            setattr(config, name, None)
    # Beside the tokenizer's, since a base model's config may name none.
    add_stop_tokens(model, [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])
    config.pad_token_id = tokenizer.pad_token_id


def add_stop_tokens(model: Any, ids: list[int]) -> None:
    """Put further ids at the end of the list of those that end an answer."""
    known = stop_ids(model)
    found = [*known, *(i for i in ids if i not in known)]
    # One id as a number, as most folders have it; a list only where it is needed.
    model.generation_config.eos_token_id = found[0] if len(found) == 1 else found or None


def stop_ids(model: Any) -> list[int]:
    """The ids that end an answer."""
    known = model.generation_config.eos_token_id
    return [] if known is None else list(known) if isinstance(known, (list, tuple)) else [known]
