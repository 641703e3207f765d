"""4-bit weights for QLoRA: the frozen linear layers of a language model as NF4 (arXiv 2305.14314; bitsandbytes)."""

from __future__ import annotations

import torch
from torch import nn

from mmkit.errors import InputError

QUANTIZATIONS = ("nf4",)


def quantize_linears(language_model: nn.Module) -> None:
    """Put 4-bit layers in place of every linear layer, in place; they quantise when the model is moved to its device.

    NF4 with the scales quantised a second time, computing in the dtype that the weights had: LLaVA's ``--bits 4``
    (facts/llava.md 1.2). Embeddings, norms and the head stay as they are.

    Args:
        language_model: A transformers model whose layers are ``nn.Linear``.

    Raises:
        InputError: bitsandbytes is missing, or there is no linear layer to quantise.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError:
        raise InputError(
            "quantised LoRA needs bitsandbytes", where="lora.quantization", mend="pip install 'mmkit[fast]', or set it to null"
        ) from None
    found = [(name, part) for name, part in language_model.named_modules() if type(part) is nn.Linear]
    # GPT-2's Conv1D is none: LoRA on it would then silently train on full weights.
    if not found:
        raise InputError(
            f"{type(language_model).__name__} has no linear layers that bitsandbytes knows",
            where="lora.quantization",
            mend="set it to null, or use another language model",
        )
    for name, part in found:
        has_bias = part.bias is not None
        # On the meta device: its own weights would be made only to be thrown away.
        with torch.device("meta"):
            layer = Linear4bit(
                part.in_features,
                part.out_features,
                bias=has_bias,
                compute_dtype=part.weight.dtype,
                compress_statistics=True,
                quant_type="nf4",
            )
        layer.weight = Params4bit(part.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
        if has_bias:
            layer.bias = nn.Parameter(part.bias.data, requires_grad=False)
        language_model.set_submodule(name, layer.to(part.weight.device))
    # What peft asks before it makes the matching kind of LoRA layer.
    language_model.is_loaded_in_4bit = True  # type: ignore[assignment]
