"""What mmkit knows of DeepSpeed's inside: how it starts and ends, where ZeRO keeps fp32 weights and the optimizer's state.

Held to the installed version by ``tests/distributed``: every mode must go on from every other's checkpoint with equal numbers.
"""

from __future__ import annotations

import os
import socket
import warnings
from typing import Any

import torch
from torch import Tensor

from mmkit.distributed.pieces import Share


def prepare_environment() -> None:
    """What DeepSpeed needs to start: a rendezvous where no launcher made one, and no compiler on CPUs."""
    if "LOCAL_RANK" not in os.environ:
        with socket.socket() as free:
            # A port that the system picks: with a fixed one two runs on a machine would meet.
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update(alone)
    # In every step, of torch's names of collectives, which DeepSpeed chooses.
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor).*", category=FutureWarning)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        # It would compile shared-memory kernels first (a minute, and a C++ compiler); gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def forget_in_transformers() -> None:
    """Keep transformers from cutting models into ZeRO-3 pieces while they are built.

    Accelerate registers its settings there even with ``zero3_init_flag=False``. Models would be loaded into pieces, by rank 0
    alone and outside our seeds, and saved under names that no other program opens; DeepSpeed cuts up the finished objective.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def forget_groups(engine: Any) -> None:
    """Make DeepSpeed let go of its process groups, which it keeps in globals and would use again in the next run."""
    import deepspeed

    if isinstance(engine, deepspeed.DeepSpeedEngine):
        # Its hooks too: they hold the model, and with it the memory of a run that is over.
        engine.destroy()
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()


def check_resolved(engine: Any, *, micro_batch_size: int, accumulation: int, world_size: int, clip: float | None) -> None:
    """Hold DeepSpeed to the recipe's numbers, whatever its JSON, Accelerate and its own defaults made of them."""
    found = {
        "micro-batch": engine.train_micro_batch_size_per_gpu(),
        "accumulation": engine.gradient_accumulation_steps(),
        "global batch": engine.train_batch_size(),
        "clipping": engine.gradient_clipping(),
    }
    meant = {
        "micro-batch": micro_batch_size,
        "accumulation": accumulation,
        "global batch": micro_batch_size * accumulation * world_size,
        "clipping": clip or 0.0,
    }
    assert found == meant, f"DeepSpeed would train with {found}, the recipe says {meant}"


def undo_first_step(engine: Any) -> None:
    """Take back the update with zero gradients by which DeepSpeed's bf16 stage 0 makes room for the optimizer's state.

    It decays the fp32 weights once at the full learning rate, and AdamW's bias correction would count one update too many:
    the first real one would be about half as long.
    """
    # Stage 0 in bf16 alone has these.
    if hasattr(engine.optimizer, "fp32_groups"):
        for pair in _groups(engine.optimizer):
            for parameter, copy in zip(*pair, strict=True):
                copy.data.copy_(parameter.data)
        # AdamW makes its state anew when it is first asked to update, with no update behind it.
        engine.basic_optimizer.state.clear()


def update(engine: Any, broken: Tensor, device: torch.device) -> Tensor:
    """DeepSpeed's update unless loss or gradient are broken, and its gradient norm.

    The loss is looked at here, which waits for the device, as DeepSpeed does in any case for its norm. The gradient is
    DeepSpeed's to look at, in pieces over the processes: ZeRO-1, 2, 3 and its bf16 optimizer leave the update out when
    the norm is not finite. Its stage 0 in fp32 does not; there the gradients lie whole in the parameters.

    Args:
        engine: DeepSpeed's.
        broken: float scalar, not 0 where the update must not happen; raised in place where the gradient says so.
        device: Where this process computes.
    """
    if hasattr(engine.optimizer, "overflow"):
        if bool(broken):
            return torch.zeros((), device=device)
        engine.step()
        return torch.as_tensor(float(engine.get_global_grad_norm() or 0.0), device=device)
    gradients = [p.grad for p in engine.parameters() if p.requires_grad and p.grad is not None]
    # Already summed over the processes, so the answer is the same on all.
    norm = torch.nn.utils.get_total_norm(gradients)
    broken.copy_(torch.maximum(broken, (~norm.isfinite()).float()))
    if not bool(broken):
        engine.step()
    return norm


def shares(engine: Any) -> list[Share]:
    """What this process holds of the trainable parameters, as views of DeepSpeed's fp32 copies."""
    optimizer = engine.optimizer
    trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        # ZeRO-3 cuts up every parameter by itself, and each process has one partition of it.
        found = (_partitioned(optimizer, name, p) for name, p in trained)
        return [share for share in found if share is not None]
    if hasattr(optimizer, "update_lp_params"):
        # ZeRO-1, 2 and the bf16 optimizer of stage 0: flat groups, of which this process holds a stretch.
        flats = [group["params"][0] for group in engine.basic_optimizer.param_groups]
        return [_stretch(name, p._hp_mapping, flats) for name, p in trained if p._hp_mapping is not None]
    if hasattr(optimizer, "fp32_groups"):
        # Stage 0 in bf16: an fp32 copy of every parameter, whole on every process.
        copies = {id(p): copy for pair in _groups(optimizer) for p, copy in zip(*pair, strict=True)}
        return [Share(name, 0, copies[id(p)].detach(), copies[id(p)], 0) for name, p in trained]
    # Stage 0 in fp32: torch's own optimizer. Any other has its weights in a place that is not known here.
    assert optimizer is engine.basic_optimizer, f"no checkpoints with DeepSpeed's {type(optimizer).__name__}"
    return whole_shares(trained)


def _groups(optimizer: Any) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Groups of parameters and of their fp32 copies."""
    return list(zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True))


def is_partitioned(engine: Any) -> bool:
    """Whether each process holds another part; under stage 0 every process holds all."""
    return hasattr(engine.optimizer, "fp32_partitioned_groups_flat") or hasattr(engine.optimizer, "update_lp_params")


def whole_shares(trained: list[tuple[str, torch.nn.Parameter]]) -> list[Share]:
    """Shares of parameters that a process holds whole."""
    return [Share(name, 0, p.detach(), p, 0) for name, p in trained]


def _stretch(name: str, mapping: Any, flats: list[Tensor]) -> Share:
    """A parameter's stretch in this process's part of a flat group."""
    # hp is the flat fp32 group, lp the parameter that computes (deepspeed/utils/tensor_fragment.py).
    inside = mapping.hp_fragment_address
    owner = flats[mapping.param_group_index]
    weight = owner.detach().narrow(0, inside.start, inside.numel)
    return Share(name, mapping.lp_fragment_address.start, weight, owner, inside.start)


def _partitioned(optimizer: Any, name: str, parameter: Any) -> Share | None:
    """A ZeRO-3 parameter's partition here; None where it is all padding."""
    # Flat group, place in it, length of the partition; gradients lie there as the fp32 weights do (stage3.py).
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = parameter.ds_zero_partition_rank * parameter.partition_numel()
    # The last process's partition may reach beyond the parameter.
    size = min(size, parameter.ds_numel - start)
    owner = optimizer.fp32_partitioned_groups_flat[group]
    return Share(name, start, owner.detach().narrow(0, offset, size), owner, offset) if size > 0 else None


def refresh(engine: Any) -> None:
    """Bring the weights that compute up to date with the fp32 copies, as DeepSpeed does after an update (a collective call)."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for i, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            optimizer.fp16_partitioned_groups_flat[i].data.copy_(flat.data)
            optimizer._unflatten_partitioned_parameters(i)
        if kept := optimizer.persistent_parameters:
            # Small ones stay whole between the steps; what they were before must not be computed with.
            kept[0].all_gather(kept)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):
        for pair in _groups(optimizer):
            for parameter, copy in zip(*pair, strict=True):
                parameter.data.copy_(copy.data)
