"""Cross-entropy of a language model at supervised positions, with logits a few rows at a time.

Most positions of a multimodal sequence are image or question. Logits of all of them in the full vocabulary are what transformers'
loss and LLaVA's compute: 655 MB for one sequence of 2048 at 32,000 tokens, in bf16, fp32 and their
gradient. Here the head is applied to supervised positions only, in chunks, loss and gradient in one sweep.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmkit.encoders.loss import soft_label_loss_sum
from mmkit.errors import InputError

# 512 rows of 32,000 logits are 65 MB in fp32.
CHUNK_ROWS = 512
Kernel = Literal["chunked", "liger"]


def token_loss_sum(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_rows: int = CHUNK_ROWS) -> Tensor:
    """Summed cross-entropy ``sum_m [logsumexp(W h_m) - (W h_m)[y_m]]``.

    It is SuperClass's softmax loss with one label of weight 1 a row, whose sweep keeps one chunk of logits at a time.

    Args:
        hidden: f[M, D].
        weight: f[V, D], the head without bias.
        targets: i64[M].
        chunk_rows: Rows of logits that exist at one time.

    Returns:
        f32[], 0 with a gradient of zeros where M is 0.
    """
    if not len(hidden):
        # The graph must still reach what came before, or processes with and without labels would run other collectives.
        return hidden.float().sum() + 0.0 * weight.float().sum()
    offsets = torch.arange(len(targets) + 1, device=targets.device)
    ones = torch.ones(len(targets), device=targets.device)
    return soft_label_loss_sum(hidden, weight, None, targets, offsets, ones, chunk_rows=chunk_rows)


class TokenLossHead(nn.Linear):
    """A language model's head that gives the loss of targets instead of logits, where it is given targets.

    A module of its own, because ZeRO-3 gathers weights around a module's call: a loss that reads ``lm_head.weight`` from outside
    finds it empty.
    """

    kernel: Kernel = "chunked"

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits f[..., V] of hidden states f[..., D]; with targets i64[M] of f[M, D] the summed loss f32[]."""
        if targets is None:
            return super().forward(hidden)
        if self.kernel == "liger" and len(hidden):
            return _liger_loss_sum(hidden, self.weight, targets)
        return token_loss_sum(hidden, self.weight, targets)


def use_loss_head(model: nn.Module, kernel: Kernel = "chunked") -> TokenLossHead:
    """Turn the head of a model into a `TokenLossHead`, in place: the same weights under the same names.

    Args:
        model: A transformers model with ``lm_head``, a Linear without bias.
        kernel: ``liger`` needs a GPU and the liger-kernel package.

    Raises:
        InputError: For ``liger`` where it cannot run.
    """
    head: Any = model.lm_head
    assert isinstance(head, nn.Linear) and head.bias is None, f"{type(head).__name__} is no bias-free linear head"
    if kernel == "liger":
        check_liger()
    # The class only: a new module would lose the tie to the embeddings, and hooks that are on it.
    head.__class__ = TokenLossHead
    head.kernel = kernel
    return head


def check_liger() -> None:
    """Whether liger's kernels can run here.

    Raises:
        InputError: No GPU, or the package is missing.
    """
    if not torch.cuda.is_available():
        raise InputError("liger's kernels need a GPU", where="liger", mend="set liger: false")
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        raise InputError("liger-kernel is not installed", where="liger", mend="pip install 'mmkit[fast]'") from None


def _liger_loss_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger's fused head and loss: f32[]."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    found: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)
    return found


def apply_liger(language_model: nn.Module) -> None:
    """Put liger's norm, rotary and feed-forward kernels into a language model, in place.

    Raises:
        InputError: Where they cannot run, or there are none for this kind of model.
    """
    check_liger()
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    kind = language_model.config.model_type  # type: ignore[union-attr]
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise InputError(f"liger has no kernels for {kind} models", where="liger", mend="set liger: false")
    # Without its loss: the head is ours, which passes supervised positions only.
    _apply_liger_kernel_to_instance(model=language_model, fused_linear_cross_entropy=False, cross_entropy=False)
