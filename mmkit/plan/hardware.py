"""What a GPU can do, from its maker's data sheet."""

from __future__ import annotations

import dataclasses

from mmkit.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: As asked for.
        tflops: Dense bf16 products, 1e12 operations a second, fp32 accumulation.
        tflops_fp32: fp32 products, without TF32, which mmkit leaves off.
        memory_gib: What CUDA reports as total, GiB.
    """

    name: str
    tflops: float
    tflops_fp32: float
    memory_gib: float


# NVIDIA's data sheets, dense figures ("with sparsity" is twice as high): A100 (2021), H100 and H200 SXM (2023, 2024), L40S, B200
# (HGX, a GPU), RTX 3090 and 4090 (architecture whitepapers). Memory: torch.cuda.mem_get_info's total, rounded down.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312, 19.5, 79.1),
        Gpu("a100-40g", 312, 19.5, 39.4),
        Gpu("h100", 989, 67, 79.1),
        Gpu("h200", 989, 67, 139.8),
        Gpu("b200", 2250, 80, 178),
        Gpu("l40s", 362, 91.6, 44.4),
        Gpu("rtx4090", 165, 82.6, 23.6),
        Gpu("rtx3090", 71, 35.6, 23.6),
    )
}


def find_gpu(name: str) -> Gpu:
    """A GPU by name.

    Raises:
        InputError: Unknown; lists those that are known.
    """
    if name not in GPUS:
        raise InputError(
            f"GPU {name!r} is unknown",
            where="--gpu",
            mend=f"use one of {', '.join(GPUS)}, or give --tflops and --gpu-memory",
        )
    return GPUS[name]
