"""``mmkit bench superclass-step``: a whole training step of SuperClass against one of CLIP (open_clip's model and loss).

Both sides: the same tower size, picture batch, precision, fused AdamW and threads; pictures and texts are on the device already,
there is no data loading. The ratio of pictures a second is set against the ratio of floating-point operations, which bounds what
leaving out the text tower can give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmkit.bench.measure import interleaved, peak_bytes
from mmkit.encoders.head import SuperClassHead
from mmkit.encoders.idf import OnlineIDF
from mmkit.encoders.loss_kinds import make_kind
from mmkit.encoders.ragged import pack_labels
from mmkit.encoders.vit import build_encoder
from mmkit.training.stages.superclass import SuperclassObjective

# CLIP's vocabulary and context; 24 labels a caption.
_VOCABULARY, _LABELS, _CONTEXT = 49408, 24, 77
Step = Callable[[], Tensor]


def run(
    *,
    architecture: str = "vit_base_patch16_224",
    peer: str = "ViT-B-16",
    batch: int = 0,
    patch_drop: float = 0.0,
    grad_checkpointing: bool = False,
    compile: bool = False,
    precision: str = "",
    repeats: int = 3,
    threads: int = 0,
) -> dict[str, Any]:
    """Compare a step's time and memory.

    Args:
        architecture: Our tower, by its timm name.
        peer: open_clip's model with a tower of the same size.
        batch: Pictures in a step; 0: 256 on a GPU, 8 on a CPU.
        patch_drop: Share of patches left out on both sides.
        grad_checkpointing: Recompute activations, on both sides.
        compile: ``torch.compile`` the towers, on both sides.
        precision: ``fp32`` or ``bf16``; empty: bf16 on a GPU, fp32 on a CPU.
        repeats: Timed steps, interleaved.
        threads: CPU threads; 0 leaves torch's choice.

    Returns:
        Conditions, pictures a second, MiB of a step beyond weights and optimiser, ratios, the FLOP bound, and on a GPU the share
        of the measured matrix-product rate.
    """
    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = batch or (256 if device.type == "cuda" else 8)
    precision = precision or ("bf16" if device.type == "cuda" else "fp32")
    # uint8 as the loader delivers them: normalising them is a part of mmkit's step.
    pixels = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    options: dict[str, Any] = {"patch_drop": patch_drop, "grad_checkpointing": grad_checkpointing, "compile_": compile}
    steps = {
        "superclass": _step(*_superclass(architecture, pixels, **options), precision, device),
        "clip": _step(*_clip(peer, pixels, **options), precision, device),
    }
    flops = {name: _flops(step) for name, step in steps.items()}  # the first step also makes the optimiser's state
    # After a first step: the optimiser's state is there and does not count as temporary.
    memory = {name: peak_bytes(step, device) for name, step in steps.items()}
    seconds = interleaved(steps, repeats=repeats, warmup=3 if device.type == "cuda" else 1)
    # Leaving out the text tower can gain no more than its operations, unless it runs at a lower rate than the images.
    bound, ratio = flops["clip"] / flops["superclass"], seconds["clip"] / seconds["superclass"]
    found: dict[str, Any] = {
        "conditions": f"{architecture} against open_clip {peer}, batch {batch}, patch_drop {patch_drop}, "
        f"checkpointing {grad_checkpointing}, compile {compile}, {precision} {device.type}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, median of {repeats}",
    }
    for name in steps:
        found[f"{name} pictures/s"] = round(batch / seconds[name], 2)
        found[f"{name} GFLOP a picture"] = round(flops[name] / batch / 1e9, 1)
        found[f"{name} MiB"] = round(memory[name] / 2**20)
    found |= {
        "pictures/s, superclass / clip": round(ratio, 3),
        "bound by FLOPs": round(bound, 3),
        "ratio / bound": round(ratio / bound, 3),
        "memory, superclass / clip": round(memory["superclass"] / memory["clip"], 3),
    }
    if device.type == "cuda":
        # Measured, because matrix products stay below the rate of the data sheet.
        rate = _matmul_rate(device)
        found["matrix-product rate, TFLOP/s"] = round(rate / 1e12)
        found["superclass, share of it"] = round(flops["superclass"] / seconds["superclass"] / rate, 3)
    return found


def _superclass(
    architecture: str, pixels: Tensor, *, patch_drop: float, grad_checkpointing: bool, compile_: bool
) -> tuple[nn.Module, Step]:
    """Our objective with everything a step does: counts, IDF, weights, loss."""
    encoder = build_encoder(architecture, image_size=224, seed=0)
    encoder.set_grad_checkpointing(grad_checkpointing)
    head, idf = SuperClassHead(encoder.width, _VOCABULARY), OnlineIDF(_VOCABULARY)
    objective = SuperclassObjective(encoder, head, idf, loss=make_kind("softmax"), chunk_rows=256).to(pixels.device).train()
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randperm(_VOCABULARY, generator=generator)[:_LABELS].sort().values.tolist() for _ in range(len(pixels))]
    ids, offsets = pack_labels(rows)
    made: dict[str, Any] = {"pixels": pixels, "ids": ids.to(pixels.device), "offsets": offsets.to(pixels.device)}
    if patch_drop:
        kept = max(1, round(encoder.num_tokens * (1 - patch_drop)))
        keep = [torch.randperm(encoder.num_tokens, generator=generator)[:kept].sort().values for _ in rows]
        # As many for each picture, as in training: the rows of a batch must have one length.
        made["keep"] = torch.stack(keep).to(pixels.device)
    if compile_:
        objective.compile_parts()

    def loss() -> Tensor:
        statistics = objective.statistics([made])
        assert statistics is not None
        # In the loop's order: the batch is counted before it is weighed. One process has nothing to sum.
        objective.absorb(lambda: statistics)
        total: Tensor = objective(made)
        # The objective gives a sum, which the loop divides by the global count.
        return total / len(pixels)

    return objective, loss


def _clip(peer: str, pixels: Tensor, *, patch_drop: float, grad_checkpointing: bool, compile_: bool) -> tuple[nn.Module, Step]:
    """open_clip's model and loss; its pictures are normalised beforehand, its captions tokenised and of full length."""
    import open_clip

    more = {"force_patch_dropout": patch_drop} if patch_drop else {}
    model = open_clip.create_model(peer, **more).to(pixels.device).train()
    if grad_checkpointing:
        model.set_grad_checkpointing()
    # Off the clock, in the peer's favour.
    floats = pixels.float() / 127.5 - 1
    # Every place filled; CLIP computes all 77 whatever the caption's length.
    text = torch.randint(1, 49406, (len(pixels), _CONTEXT), generator=torch.Generator().manual_seed(2)).to(pixels.device)
    # End of text, whose place open_clip finds by the highest id and pools.
    text[:, -1] = 49407
    criterion = open_clip.ClipLoss()
    called = torch.compile(model) if compile_ else model

    def loss() -> Tensor:
        # Models with a logit bias return a fourth value.
        image, caption, scale = called(floats, text)[:3]
        total: Tensor = criterion(image, caption, scale)
        return total

    return model, loss


def _step(module: nn.Module, loss: Step, precision: str, device: torch.device) -> Callable[[], None]:
    """Forward, backward and update."""
    # A rate at which the weights hardly move: every repeat computes on the same sizes of numbers.
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        # Forward and loss only, as in training; backward runs in the dtypes that forward chose.
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _flops(step: Callable[[], None]) -> float:
    """Floating-point operations of a step's matrix products, multiply and add counted as two."""
    # Attention as plain products while it is counted: the counter does not know every fused kernel (torch 2.14's on the CPU).
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def _matmul_rate(device: torch.device, *, size: int = 8192, repeats: int = 20) -> float:
    """Floating-point operations a second of a large bf16 matrix product, the yardstick."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)

    def work() -> None:
        for _ in range(repeats):
            torch.mm(a, a)

    return 2 * size**3 * repeats / interleaved({"mm": work}, repeats=5)["mm"]
