"""The chunked language-model loss against torch's on full logits, and the head that computes it in place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmkit.errors import InputError
from mmkit.models.llm import build_llm
from mmkit.models.lm_loss import TokenLossHead, apply_liger, token_loss_sum, use_loss_head
from tests.models.tiny import LLAMA, tokenizer


def inputs(rows: int = 37, width: int = 16, vocab: int = 50, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(vocab, (rows,))


@pytest.mark.parametrize("chunk_rows", [1, 8, 37, 512])
def test_the_sum_and_its_gradients_equal_torch_on_full_logits(chunk_rows):
    hidden, weight, targets = inputs()
    reference = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    ours = token_loss_sum(hidden, weight, targets, chunk_rows=chunk_rows)
    torch.testing.assert_close(ours, reference)
    wanted = torch.autograd.grad(reference * 0.25, (hidden, weight))
    for ours_grad, theirs in zip(torch.autograd.grad(ours * 0.25, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(ours_grad, theirs)


def test_a_frozen_head_gets_no_gradient_and_hidden_states_the_same():
    hidden, weight, targets = inputs()
    reference = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets, reduction="sum"), hidden)[0]
    weight.requires_grad_(False)
    token_loss_sum(hidden, weight, targets, chunk_rows=8).backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, reference)


def test_no_targets_give_zero_with_gradients_of_zero():
    hidden, weight, targets = inputs(rows=0)
    loss = token_loss_sum(hidden, weight, targets)
    assert loss.item() == 0.0
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert [float(g.abs().sum()) for g in grads] == [0.0, 0.0]


def test_bf16_autocast_sums_in_float32():
    hidden, weight, targets = inputs(rows=300, vocab=400, dtype=torch.float32)
    exact = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = token_loss_sum(hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), rel=2e-3)


def test_the_head_of_a_model_gives_logits_or_loss_and_stays_the_same_layer():
    model = build_llm(None, config={**LLAMA, "tie_word_embeddings": True}, tokenizer=tokenizer("sp"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    head = use_loss_head(model)
    assert model.lm_head is head and isinstance(head, nn.Linear)
    assert head.weight is model.get_input_embeddings().weight, "the tie to the embeddings is kept"
    assert before.keys() == model.state_dict().keys()
    hidden, targets = torch.randn(5, 32), torch.randint(20, (5,))
    logits = head(hidden)
    torch.testing.assert_close(logits, F.linear(hidden, head.weight))
    torch.testing.assert_close(head(hidden, targets), F.cross_entropy(logits, targets, reduction="sum"))


def test_a_head_with_a_bias_is_a_programming_error():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(4, 8)

    with pytest.raises(AssertionError, match="no bias-free linear head"):
        use_loss_head(Model())


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells of a machine without a GPU")
def test_liger_without_a_gpu_is_refused():
    model = build_llm(None, config=LLAMA, tokenizer=tokenizer("sp"))
    with pytest.raises(InputError, match="liger's kernels need a GPU"):
        use_loss_head(model, "liger")
    with pytest.raises(InputError, match="liger's kernels need a GPU"):
        apply_liger(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_liger_gives_the_loss_and_the_gradients_of_the_chunked_sweep():
    pytest.importorskip("liger_kernel")
    model = build_llm(None, config=LLAMA, tokenizer=tokenizer("sp")).cuda()
    hidden = torch.randn(300, 32, device="cuda", requires_grad=True)
    targets = torch.randint(20, (300,), device="cuda")
    found = {}
    for kernel in ("chunked", "liger"):
        head = use_loss_head(model, kernel)
        loss = head(hidden, targets)
        found[kernel] = (loss, *torch.autograd.grad(loss, (hidden, head.weight)))
    for ours, theirs in zip(found["chunked"], found["liger"], strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-3, atol=1e-3)
    assert isinstance(model.lm_head, TokenLossHead)
