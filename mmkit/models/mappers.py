"""ClipCap's two mappers from image features to language model embeddings, and the scaling of the features.

Sizes follow rmokady/CLIP_prefix_caption at 1ad805a (train.py: MLP, TransformerMapper); facts/clipcap.md 1 has the
parameter counts that the tests check.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkit.errors import InputError

FEATURE_NORMS = ("none", "l2", "standardize")
# Pictures whose features are in memory at one time while statistics are taken.
_FIT_ROWS = 256


class FeatureNorm(nn.Module):
    """Scaling of image features before the mapper, saved with the model.

    The published code normalises in a notebook but not in training; here there is one setting, in the checkpoint.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, kind: str, dim: int) -> None:
        """Set the kind: "none", "l2" (length 1) or "standardize" (per dimension, by statistics of the training set)."""
        super().__init__()
        self.kind = kind
        if kind == "standardize":
            # Buffers: saved with the weights, moved with the model, left alone by the optimizer.
            self.register_buffer("feature_mean", torch.zeros(dim))
            self.register_buffer("feature_std", torch.ones(dim))

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Take mean and standard deviation from training features f[N, D] or f[N, T, D].

        Rows with NaN (unreadable pictures) do not count; a constant dimension keeps scale 1.
        """
        assert self.kind == "standardize", f"feature_norm {self.kind} has no statistics"
        count, dim = 0, features.shape[-1]
        mean, squares = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
        # Part by part: patch tokens of a whole set lie on the disk. Merged as Chan, Golub and LeVeque do (1979, formula 2.1), in
        # float64: where a deviation is small beside its mean, float32 has too few digits for it.
        for part in features.split(_FIT_ROWS):
            rows = part[~part.flatten(1).isnan().any(1)].reshape(-1, dim).double()
            if not len(rows):
                continue
            gap, total = rows.mean(0) - mean, count + len(rows)
            squares += (rows - rows.mean(0)).square().sum(0) + gap.square() * (count * len(rows) / total)
            mean += gap * (len(rows) / total)
            count = total
        std = (squares / max(1, count)).sqrt()
        self.feature_mean.copy_(mean)
        # A dead unit of the encoder would otherwise be divided by zero.
        self.feature_std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def forward(self, features: Tensor) -> Tensor:
        """Scale features f[..., D] -> f[..., D]."""
        # Length 1 for each vector by itself: needs no statistics, and what a feature's length says is lost.
        if self.kind == "l2":
            return F.normalize(features, dim=-1)
        if self.kind == "standardize":
            return (features - self.feature_mean) / self.feature_std
        return features


class MLPMapper(nn.Module):
    """Linear(D, H·P/2), Tanh, Linear(H·P/2, H·P): one pooled feature to P embeddings."""

    def __init__(self, feature_dim: int, width: int, prefix_length: int) -> None:
        """Set D = ``feature_dim``, H = ``width``, P = ``prefix_length``."""
        super().__init__()
        self.prefix_length = prefix_length
        # As in train.py for any P; predict.py's single layer for P > 10 is a fault of its own (facts/clipcap.md 7).
        hidden = width * prefix_length // 2
        self.layers = nn.Sequential(nn.Linear(feature_dim, hidden), nn.Tanh(), nn.Linear(hidden, width * prefix_length))

    def forward(self, features: Tensor) -> Tensor:
        """Map features f[B, D] -> prefix f[B, P, H]."""
        return self.layers(features).unflatten(-1, (self.prefix_length, -1))


class _Attention(nn.Module):
    """Full self-attention; query, key and value without bias, output with one."""

    def __init__(self, width: int, heads: int) -> None:
        """Make the projections."""
        super().__init__()
        self.heads = heads
        # Keys and values in one layer, as in the published code.
        self.to_queries = nn.Linear(width, width, bias=False)
        self.to_keys_values = nn.Linear(width, 2 * width, bias=False)
        self.project = nn.Linear(width, width)

    def forward(self, x_BLH: Tensor) -> Tensor:
        """Attend over all positions, f[B, L, H] -> f[B, L, H]."""
        q_BLH = self.to_queries(x_BLH)
        k_BLH, v_BLH = self.to_keys_values(x_BLH).chunk(2, dim=-1)
        # f[B, heads, L, H / heads].
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q_BLH, k_BLH, v_BLH))
        return self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """Pre-norm block: attention, then an MLP of ratio 2 with ReLU; no dropout."""

    def __init__(self, width: int, heads: int) -> None:
        """Make the two halves."""
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x_BLH: Tensor) -> Tensor:
        """One residual block, f[B, L, H] -> f[B, L, H]."""
        x_BLH = x_BLH + self.attn(self.norm1(x_BLH))
        return x_BLH + self.mlp(self.norm2(x_BLH))


class TransformerMapper(nn.Module):
    """Image tokens and P learned constants through self-attention; the last P outputs are the prefix.

    A pooled feature is expanded to C tokens by one linear layer. Patch tokens, where the features have them, are
    projected one by one and take the place of those C tokens (mmkit's addition). No final norm, no positions.
    """

    def __init__(
        self,
        feature_dim: int,
        width: int,
        prefix_length: int,
        *,
        clip_length: int,
        tokens: bool,
        layers: int,
        heads: int,
    ) -> None:
        """Set D, H, P, C = ``clip_length`` and whether the features are patch ``tokens``."""
        if width % heads:
            fitting = [h for h in range(heads, 0, -1) if width % h == 0]
            raise InputError(
                f"num_heads {heads} does not divide the language model's width {width}",
                where="mapper.num_heads",
                mend=f"use {fitting[0]}, say",
            )
        super().__init__()
        self.tokens, self.clip_length = tokens, clip_length
        # One layer for all C tokens: a pooled vector has no parts, so each token gets its own view of all of it.
        self.linear = nn.Linear(feature_dim, width if tokens else clip_length * width)
        # N(0, 1) as published; not torch's smaller default.
        self.prefix_const = nn.Parameter(torch.randn(prefix_length, width))
        self.layers = nn.ModuleList([_Block(width, heads) for _ in range(layers)])

    def forward(self, features: Tensor) -> Tensor:
        """Map features f[B, D], or patch tokens f[B, N, D], to the prefix f[B, P, H]."""
        x_BLH = self.linear(features)
        if not self.tokens:
            x_BLH = x_BLH.unflatten(-1, (self.clip_length, -1))
        const = self.prefix_const.to(x_BLH.dtype).expand(len(x_BLH), -1, -1)
        # Constants last: with no position embeddings the place in the sequence only decides which outputs are the prefix.
        x_BLH = torch.cat([x_BLH, const], dim=1)
        for block in self.layers:
            x_BLH = block(x_BLH)
        return x_BLH[:, -const.shape[1] :]
