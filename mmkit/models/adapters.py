"""What of a LLaVA model trains: the projector, and with it the language model or LoRA layers inside it; the vision tower too.

LoRA is put into the language model only, by exact module: suffix matching has put it into vision towers
(haotian-liu/LLaVA#1647), and adapters saved without the projector were lost (facts/llava.md 1.8).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from mmkit.errors import InputError
from mmkit.models.projectors import VisionLanguageModel, image_size, train_projector
from mmkit.models.quantize import QUANTIZATIONS, quantize_linears

Tune = Literal["projector", "full", "lora"]
# LLaVA's finetune_lora.sh; plain LoRA on weights as they are.
_LORA_DEFAULTS: dict[str, Any] = {"r": 128, "alpha": 256, "dropout": 0.05, "dora": False, "quantization": None}


def has_lora(model: nn.Module) -> bool:
    """Whether the model has LoRA layers that are not merged."""
    # By layer and not by a mark on the model: injection leaves the model's class as it is.
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def _inject_lora(model: VisionLanguageModel, lora: dict[str, Any], seed: int) -> None:
    """Put LoRA layers in place of every linear layer of the language model; lm_head is not inside it."""
    # A misspelt key would be lost in silence: only the known ones are read below.
    unknown = sorted(set(lora) - set(_LORA_DEFAULTS))
    if unknown:
        raise InputError(f"unknown LoRA setting {unknown[0]!r}", mend=f"known are {', '.join(_LORA_DEFAULTS)}")
    settings = {**_LORA_DEFAULTS, **lora}
    # From here down only: a match by name over the whole model would reach the vision tower's q_proj too.
    language_model = model.model.language_model
    if settings["quantization"] is not None:
        if settings["quantization"] not in QUANTIZATIONS:
            raise InputError(f"unknown quantization {settings['quantization']!r}", mend=f"use {', '.join(QUANTIZATIONS)} or null")
        quantize_linears(language_model)
    names = [name for name, part in language_model.named_modules() if isinstance(part, (nn.Linear, Conv1D))]
    config = LoraConfig(
        r=settings["r"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=names,
        bias="none",
        # Weight-decomposed: length and direction of each weight row are learnt apart (arXiv 2402.09353).
        use_dora=settings["dora"],
        # GPT-2's Conv1D stores its weight transposed.
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in language_model.modules()),
    )
    # The global generator stays as it was: a run with adapters must not shift any other draw.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Without a PeftModel around it the model keeps its class and the paths of its modules.
        inject_adapter_in_model(config, language_model)


def freeze_for(
    model: VisionLanguageModel,
    tune: Tune,
    *,
    lora: dict[str, Any] | None = None,
    train_encoder: bool = False,
    seed: int = 0,
) -> VisionLanguageModel:
    """Set what trains, in place. Frozen parts are also put in eval mode: see `set_train_mode`.

    Args:
        model: The model.
        tune: "projector" (align), "full" (language model and projector) or "lora" (LoRA layers and projector).
        lora: ``r``, ``alpha``, ``dropout``, ``dora`` and ``quantization`` for "lora"; LLaVA's values (128, 256, 0.05), plain LoRA
            on weights as they are where not given.
        train_encoder: Train the vision tower too, as far as the features that the projector reads depend on it.
        seed: Of the LoRA layers' weights.

    Returns:
        The same model.

    Raises:
        InputError: For an unknown ``tune`` or LoRA setting.
    """
    if tune not in ("projector", "full", "lora"):
        raise InputError(f"unknown tune {tune!r}", mend="use projector, full or lora")
    if lora and tune != "lora":
        raise InputError(f"lora settings with tune {tune!r}", mend="drop them or set tune: lora")
    # From a clean slate, so that the same model can be set to another mode.
    model.requires_grad_(False)
    if tune == "lora" and not has_lora(model):
        _inject_lora(model, lora or {}, seed)
    # base_model has no head; a tied one is set twice, which does no harm.
    if tune == "full":
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    elif tune == "lora":
        for name, parameter in model.model.language_model.named_parameters():
            # peft's own prefix of the added matrices; the weights they adapt stay frozen.
            parameter.requires_grad_("lora_" in name)
    # In every mode: LLaVA's LoRA trains the projector in full too (facts/llava.md 1.2).
    train_projector(model)
    if train_encoder:
        _train_tower(model)
    set_train_mode(model, model.training)
    return model


def _train_tower(model: VisionLanguageModel) -> None:
    """Let those weights of the vision tower train that the features depend on.

    With feature layer -2 the last block, the final norm and a pooling head have no effect; without a gradient they would stop
    DDP, and with weight decay they would shrink.
    """
    tower = model.model.vision_tower
    tower.requires_grad_(True)
    weights = list(tower.parameters())
    size = image_size(tower.config)
    blank = torch.zeros(1, 3, size, size, dtype=weights[0].dtype, device=weights[0].device)
    # Asked of autograd, so that it holds for every kind of tower; the values do not matter.
    with torch.enable_grad():
        features = torch.cat(tuple(model.get_image_features(blank, return_dict=True).pooler_output))
    found = torch.autograd.grad(features.sum(), weights, allow_unused=True)
    for weight, gradient in zip(weights, found, strict=True):
        weight.requires_grad_(gradient is not None)


def set_train_mode(model: VisionLanguageModel, training: bool = True) -> None:
    """``model.train()`` for the parts that train; a frozen part stays in eval mode (dropout off).

    To be called in place of ``model.train()``, which would wake the frozen parts.
    """
    model.train(training)
    for part in (model.model.vision_tower, model.model.language_model, model.model.multi_modal_projector):
        if not any(parameter.requires_grad for parameter in part.parameters()):
            # transformers recomputes activations in training mode only; a frozen LLM between loss and projector needs it most.
            if part is model.model.language_model and getattr(part, "gradient_checkpointing", False):
                _switch_dropout_off(part)
                continue
            part.eval()


def _switch_dropout_off(part: nn.Module) -> None:
    """Make training mode compute the same as eval mode; the configuration, which is saved, stays as it is."""
    for module in part.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # transformers' attention layers hold their rate as a number.
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def merge_lora(model: VisionLanguageModel) -> VisionLanguageModel:
    """Add LoRA layers into the weights they adapt and take them out, in place.

    Returns:
        The same model, now without LoRA layers.
    """
    layers = [(name, part) for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)]
    for name, layer in layers:
        # Safe: refuses to write weights that are not finite.
        layer.merge(safe_merge=True)
        parent, _, leaf = name.rpartition(".")
        # The plain layer back in its place: any program opens the folder, and no key mentions an adapter.
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    if layers:
        # peft leaves its configuration on the module it injected into; a merged model must not announce adapters.
        for part in model.modules():
            if hasattr(part, "peft_config"):
                del part.peft_config
            if getattr(part, "_hf_peft_config_loaded", False):
                part._hf_peft_config_loaded = False
    return model
