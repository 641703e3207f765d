"""The dry run against real runs of small models on the CPU: bytes held, peak, and operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmkit.bench.measure import peak_bytes
from mmkit.config import load_recipe
from mmkit.plan import subjects
from mmkit.plan.subjects import Subject, make_subject
from mmkit.recipes import find_recipe

# What is held and the peak must agree with the measurement within this share; the shapes are exact, the kernels' scratch is not.
TOLERANCE = 0.1
VIT = [
    "encoder.image_size=64",
    "encoder.patch_size=8",
    "encoder.model_args={embed_dim: 64, depth: 4, num_heads: 4}",
    "data.val=null",
    "train.val_every=null",
]
GPT2 = "llm.config={model_type: gpt2, n_embd: 64, n_layer: 4, n_head: 4, n_positions: 96, vocab_size: 500}"
LLAMA = (
    "llm.config={model_type: llama, hidden_size: 64, intermediate_size: 172, num_hidden_layers: 4, num_attention_heads: 4, "
    "num_key_value_heads: 2, vocab_size: 500}"
)
ENCODER = "encoder=superclass-vit-s16"
ALIGN = ["demo-llava-align", "encoder=demo-superclass", LLAMA, "max_length=128"]
CASES = {
    "superclass": (["demo-superclass", *VIT], 8, 0),
    "superclass checkpointed": (["demo-superclass", *VIT, "encoder.grad_checkpointing=true"], 8, 0),
    "superclass half of the patches": (["demo-superclass", *VIT, "encoder.patch_drop=0.5"], 8, 0),
    "clip": (["demo-superclass", *VIT, "stage=clip", "train.batch_size=16"], 8, 0),
    "lit": (["demo-superclass", *VIT, "stage=lit", "encoder.init=x", "train.batch_size=16"], 8, 0),
    "clipcap, mapper only": (["clipcap-superclass", GPT2, "llm.name=null", "llm.tokenizer=x", "tune_llm=false"], 4, 40),
    "clipcap, GPT-2 too": (["demo-clipcap", GPT2, "encoder=demo-superclass"], 4, 40),
    "llava projector": ([*ALIGN], 2, 120),
    "llava projector checkpointed": ([*ALIGN, "grad_checkpointing=true"], 2, 120),
    "llava full": ([*ALIGN, "tune=full"], 2, 120),
    "llava full checkpointed": ([*ALIGN, "tune=full", "grad_checkpointing=true"], 2, 120),
    "llava lora": ([*ALIGN, "tune=lora", "lora.r=8"], 2, 120),
}


def both(words: list[str]) -> tuple[Subject, Subject]:
    """A recipe's subject without content, and the same modules with it."""
    recipe = load_recipe(find_recipe(words[0]), words[1:])
    planned = make_subject(recipe)
    planned.place(None)
    build = {"superclass": subjects._superclass, "clipcap": subjects._clipcap, "llava": subjects._llava}
    builder: Any = build.get(recipe.stage, subjects._contrastive)
    torch.manual_seed(0)
    real = builder(recipe) if recipe.stage in ("superclass", "clip", "lit") else builder(recipe, None)
    real.objective.train()
    return planned, real


def real_batch(subject: Subject, rows: int, length: int) -> dict[str, Any]:
    """The planned batch with the content that a real pass needs."""
    batch = subject.batch(rows, length)
    if subject.given:
        # A picture in front, and nothing of it learnt; a padded row, so that attention needs its mask.
        batch["labels"] = batch["input_ids"].clone()
        batch["input_ids"][:, : subject.given] = subject.objective.model.config.image_token_id
        batch["labels"][:, : subject.given + 1] = -100
        batch["attention_mask"][0, -1] = 0
    if "labels" in batch and not subject.given:
        batch["attention_mask"][0, -1] = 0
    return batch


def held_bytes(module: nn.Module, batch: dict[str, Any]) -> int:
    """Bytes that autograd keeps for backward, by torch's own hooks, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = module(batch)
    # Only now: the loss holds the graph, and no address comes twice while it does.
    total = sum(kept.values())
    del loss
    return total


@pytest.mark.parametrize("case", CASES)
def test_peak_is_that_of_a_real_pass(case: str) -> None:
    words, rows, length = CASES[case]
    planned, real = both(words)
    found = planned.trace(rows, length, autocast=False)
    batch = real_batch(real, rows, length)

    def step() -> list[Tensor]:
        real.objective(batch).backward()
        return [p.grad for p in real.objective.parameters() if p.grad is not None]

    # Once before: lazy state (masks, caches of frequencies) is no part of a step.
    step()
    real.objective.zero_grad(set_to_none=True)
    measured = peak_bytes(step, torch.device("cpu"))
    inputs = sum(v.numel() * v.element_size() for v in batch.values() if isinstance(v, Tensor))
    assert found.peak == pytest.approx(measured + inputs, rel=TOLERANCE), (found, measured, inputs)


@pytest.mark.parametrize("case", [c for c in CASES if "checkpointed" not in c])
def test_held_bytes_are_those_that_autograd_keeps(case: str) -> None:
    words, rows, length = CASES[case]
    planned, real = both(words)
    found = planned.trace(rows, length, autocast=False)
    assert found.held == pytest.approx(held_bytes(real.objective, real_batch(real, rows, length)), rel=0.15), found


def test_checkpointing_keeps_less_and_computes_twice() -> None:
    with_, without = (both(CASES[name][0])[0].trace(2, 120, autocast=False) for name in ("llava full checkpointed", "llava full"))
    assert with_.held < 0.6 * without.held and with_.peak < without.peak
    assert without.recomputed == 0
    # The last product of a block is not needed again: checkpointing stops before it.
    blocks = sum(count for name, count in with_.forward.items() if name.startswith("language model"))
    assert 0.7 * blocks < with_.recomputed < blocks
    # Backward may be more: checkpointing makes the embeddings' outputs need gradients, also those of a frozen tower.
    assert with_.forward == without.forward and with_.backward >= without.backward


@pytest.mark.parametrize("case", ["superclass", "superclass half of the patches", "clip", "clipcap, GPT-2 too", "llava full"])
def test_operations_are_those_that_torch_counts(case: str) -> None:
    words, rows, length = CASES[case]
    planned, real = both(words)
    found = planned.trace(rows, length, autocast=False)
    batch = real_batch(real, rows, length)
    # Its counter knows attention by its products only.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = real.objective(batch)
        forward = counter.get_total_flops()
        loss.backward()
    causal = case == "clip"  # the text tower's mask is a tensor there, so nothing is left out
    assert sum(found.forward.values()) == pytest.approx(forward, rel=0.02 if causal else 0.01)
    # Fused attention computes its scores again in backward: five products to the four of the plain way.
    assert found.backward == pytest.approx(counter.get_total_flops() - forward, rel=0.08)


def test_bf16_weights_are_copied_under_autocast_and_not_under_deepspeed() -> None:
    recipe = load_recipe(find_recipe("demo-superclass"), VIT)
    autocast, cast = make_subject(recipe), make_subject(recipe)
    autocast.place(None)
    cast.place(torch.bfloat16)
    one, other = autocast.trace(8, 0, autocast=True), cast.trace(8, 0, autocast=False)
    linear = sum(p.numel() for p in autocast.objective.encoder.backbone.blocks.parameters() if p.ndim == 2)
    assert one.saved["bf16 copies of weights"] >= 2 * linear
    assert "bf16 copies of weights" not in other.saved
    # The residual stream is fp32 under autocast. The head's gradient is summed in fp32 in both, before it is the weights'.
    towers = [sum(size for name, size in found.saved.items() if name.startswith("tower")) for found in (other, one)]
    assert towers[0] < towers[1]


def test_an_unknown_encoder_is_refused_and_a_stand_in_taken(tmp_path: Path) -> None:
    from mmkit.errors import InputError

    with torch.device("meta"):
        with pytest.raises(InputError, match="--encoder"):
            subjects.named_encoder(str(tmp_path))
        assert subjects.named_encoder(str(tmp_path), "timm:vit_small_patch16_224").width == 384
        assert subjects.named_encoder("runs/superclass-vit-l16").width == 1024
