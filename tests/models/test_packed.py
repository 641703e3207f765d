"""Packed documents give what each of them gives alone, forward and gradient, for several families of language models."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mmkit.errors import InputError
from mmkit.models.packed import IMPLEMENTATION, allow_packing, packed_arguments, packed_attention

FAMILIES = {
    "llama": {"num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},
    "qwen2": {"num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},
    "qwen3": {"num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8},
    "mistral": {
        "num_key_value_heads": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "head_dim": 8,
        "sliding_window": 6,
    },
    "gpt2": {"n_embd": 32, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
}
LENGTHS = (3, 17, 1, 9)


def make(family: str):
    layers = {"n_layer": 2} if family == "gpt2" else {"num_hidden_layers": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=50, **layers, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config).double()


def seqlens(lengths=LENGTHS, device="cpu") -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_equals_its_documents_alone_forward_and_gradient(family):
    model = make(family)
    documents = [torch.randint(50, (1, n)) for n in LENGTHS]
    alone = torch.cat([model(d).logits for d in documents], dim=1)
    weights = torch.randn_like(alone)
    wanted = torch.autograd.grad((alone * weights).sum(), list(model.parameters()))
    allow_packing(model)
    packed = model(torch.cat(documents, dim=1), use_cache=False, **packed_arguments(LENGTHS, torch.device("cpu"))).logits
    torch.testing.assert_close(packed, alone)
    for ours, theirs in zip(torch.autograd.grad((packed * weights).sum(), list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_and_generation_are_as_before(family):
    model = make(family).eval()
    ids = torch.randint(1, 50, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, :2] = 0
    before = model(ids, attention_mask=mask).logits
    told = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    written = model.generate(ids, attention_mask=mask, **told)
    allow_packing(model)
    assert model.config._attn_implementation == IMPLEMENTATION
    seen = mask.bool()
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[seen], before[seen])
    assert torch.equal(model.generate(ids, attention_mask=mask, **told), written)


def test_a_document_does_not_see_its_neighbours():
    model = make("llama")
    allow_packing(model)
    ids = torch.randint(50, (1, sum(LENGTHS)))
    arguments = packed_arguments(LENGTHS, torch.device("cpu"))
    before = model(ids, use_cache=False, **arguments).logits
    ids[0, :3] = (ids[0, :3] + 1) % 50
    after = model(ids, use_cache=False, **arguments).logits
    assert not torch.equal(before[0, :3], after[0, :3])
    assert torch.equal(before[0, 3:], after[0, 3:])


def test_positions_begin_anew_in_each_document():
    assert packed_arguments((2, 3), torch.device("cpu"))["position_ids"].tolist() == [[0, 1, 0, 1, 2]]


def test_gradient_checkpointing_changes_nothing():
    model = make("llama").train()
    allow_packing(model)
    ids = torch.randint(50, (1, sum(LENGTHS)))
    arguments = packed_arguments(LENGTHS, torch.device("cpu"))
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(model(ids, use_cache=False, **arguments).logits.square().sum(), parameters)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = torch.autograd.grad(model(ids, use_cache=False, **arguments).logits.square().sum(), parameters)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_flash_attention_gives_what_the_documents_give_one_by_one(window, key_heads):
    torch.manual_seed(0)
    query = torch.randn(1, 4, sum(LENGTHS), 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    key, value = (
        torch.randn(1, key_heads, sum(LENGTHS), 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)
    )
    how = {"sliding_window": window, "document_lengths": LENGTHS, "cu_seqlens": seqlens(device="cuda")}
    module = torch.nn.Identity()
    flash = packed_attention(module, query, key, value, None, **how)[0]
    wide = [t.detach().float().requires_grad_() for t in (query, key, value)]
    exact = packed_attention(module, *wide, None, **how)[0]
    torch.testing.assert_close(flash.float(), exact, rtol=2e-2, atol=2e-2)
    weights = torch.randn_like(exact)
    found = torch.autograd.grad((flash.float() * weights).sum(), (query, key, value))
    for ours, theirs in zip(found, torch.autograd.grad((exact * weights).sum(), wide), strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=5e-2, atol=5e-2)


SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
UNFIT = {
    # Attention of its own, whatever name it is told.
    "falcon": {**SMALL, "new_decoder_architecture": False},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "gpt_neo": {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "attention_types": [[["global"], 2]]},
    # Takes the name and does not hand the documents on.
    "stablelm": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 4},
}


@pytest.mark.parametrize("family", UNFIT)
def test_models_through_which_documents_would_see_each_other_are_refused(family):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=50, **UNFIT[family]))
    with pytest.raises(InputError, match=f"{family} models cannot read packed rows; use grouped"):
        allow_packing(model)
