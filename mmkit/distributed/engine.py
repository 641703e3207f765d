"""The one seam between a single-device objective and many processes: Accelerate for one process and DDP, DeepSpeed for ZeRO.

Loss scale. Objectives return *sums*; the loop hands over the global count, and a step's gradient is
``sum over ranks and micro-batches of d(loss_sum) / global count``. DDP and DeepSpeed both average gradients over ranks, so the
loss is multiplied by the world size; DeepSpeed divides by its accumulation steps too, so that is switched off. Nothing
else in mmkit scales a loss, and ``tests/distributed`` holds one process equal to two in every mode.
"""

from __future__ import annotations

import datetime
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.distributed import skeleton, zero
from mmkit.distributed.collectives import AllGather
from mmkit.distributed.liveness import Liveness
from mmkit.distributed.pieces import Saved, Share, changing_buffers, pack, unpack
from mmkit.distributed.settings import deepspeed_settings
from mmkit.distributed.snapshot import HostCopies, StateFile, room_for, state_size
from mmkit.errors import InputError

logger = logging.getLogger(__name__)


class Engine:
    """Runs an objective on the processes that a launcher started.

    Attributes:
        rank: This process.
        world_size: Number of processes.
        device: Where this process computes.
        weight_dtype: What DeepSpeed will round the weights to, so that a model need not be read in more; None: it rounds nothing.
    """

    _made = 0

    def __init__(
        self,
        *,
        precision: str,
        deepspeed: Path | None,
        batch_size: int,
        micro_batch_size: int | None,
        clip: float | None,
        max_tokens: int | None = None,
    ) -> None:
        """Join the processes that the launcher started.

        Args:
            precision: ``fp32``, or ``bf16`` (autocast over fp32 weights; DeepSpeed keeps its own fp32 copy).
            deepspeed: DeepSpeed JSON; None is one process or DDP.
            batch_size: Global batch.
            micro_batch_size: Samples per process and forward pass; None takes a process's share of the batch in one piece.
            clip: Largest gradient norm; None does not clip.
            max_tokens: Micro-batches have at most so many tokens, and their number differs from step to step; None: they have
                ``micro_batch_size`` samples.

        Raises:
            InputError: The global batch does not divide.
        """
        from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs

        # From the environment: the accumulation is an argument of Accelerate, so it must be known before Accelerate is.
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        # null in a recipe: a process's share in one piece, whatever the number of processes.
        self.micro_batch_size = micro_batch_size or max(1, batch_size // world_size)
        self.accumulation, rest = divmod(batch_size, self.micro_batch_size * world_size)
        # Never rounded: another batch is another experiment.
        if rest or not self.accumulation:
            raise InputError(
                f"global batch {batch_size} is no multiple of micro-batch {self.micro_batch_size} x world size {world_size}",
                where="train.batch_size",
                mend="change train.batch_size, train.micro_batch_size or the number of processes",
            )
        self.clip, self.max_tokens = clip, max_tokens
        self.uses_deepspeed = deepspeed is not None
        self.weight_dtype = torch.bfloat16 if self.uses_deepspeed and precision == "bf16" else None
        self._settings: dict[str, Any] = {}
        plugin = None
        if deepspeed is not None:
            self._settings = deepspeed_settings(
                deepspeed,
                micro_batch_size=self.micro_batch_size,
                accumulation=self.accumulation,
                clip=clip,
                precision=precision,
                adds_up=self.accumulation > 1 or max_tokens is not None,
            )
            zero.prepare_environment()
            plugin = DeepSpeedPlugin(hf_ds_config=self._settings, zero3_init_flag=False)
        # Frozen parts are excluded by requires_grad, every trainable part takes part in every step (dummy path for text-only
        # batches), so the search for unused parameters stays off; buffers such as the IDF are summed by hand, not broadcast.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        handlers: list[Any] = [ddp]
        on_cpu = not torch.cuda.is_available()
        if on_cpu and "LOCAL_RANK" in os.environ:
            # Accelerate sees the launcher's processes on CPUs only if it is told so; its DeepSpeed path must not be told.
            handlers.append(InitProcessGroupKwargs(backend="gloo"))
        self._accelerator = Accelerator(
            cpu=on_cpu and not self.uses_deepspeed,
            mixed_precision="bf16" if precision == "bf16" else "no",
            # DeepSpeed's own number again, or Accelerate warns of a mismatch; elsewhere the loop adds up by itself.
            gradient_accumulation_steps=self.accumulation if self.uses_deepspeed else 1,
            deepspeed_plugin=plugin,
            kwargs_handlers=handlers,
        )
        if self.uses_deepspeed:
            zero.forget_in_transformers()
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device
        assert self.world_size == world_size, f"launcher says {world_size} processes, Accelerate found {self.world_size}"
        self.module: nn.Module = nn.Identity()
        self.optimizer: Any = None
        self._broken: Tensor | None = None
        self._copies = HostCopies()
        self._meetings = 0
        self._store: Any = None
        self._liveness: Liveness | None = None
        if self.world_size > 1:
            Engine._made += 1
            # torch has no public name for the store that it found the other processes by.
            default = torch.distributed.distributed_c10d._get_default_store()
            # torchrun's store outlives an engine: another one in these processes must not find the keys of the first.
            self._store = torch.distributed.PrefixStore(f"mmkit/{Engine._made}", default)
            self._liveness = Liveness(self.rank, self.world_size, self._store)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    @property
    def cuts_up(self) -> bool:
        """Whether no process holds the whole model (ZeRO-3)."""
        return self.world_size > 1 and self._settings.get("zero_optimization", {}).get("stage") == 3

    @property
    def skeleton(self) -> bool:
        """Whether to build the model on the meta device here: under ZeRO-3 rank 0 reads it and hands out the pieces."""
        return self.cuts_up and not self.is_main

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module to the device; under ZeRO-3 leave it, since no device has to hold it whole."""
        return module if self.cuts_up else module.to(self.device)

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Wrap the finished objective for the chosen mode (a collective call)."""
        if self.cuts_up:
            skeleton.partition(module, self._settings, dtype=self.weight_dtype or torch.float32, device=self.device)
        if self.uses_deepspeed or self.world_size > 1:
            with warnings.catch_warnings():
                # torch has a new name for broadcast_buffers, which Accelerate does not know yet.
                warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
                self.module, self.optimizer = self._accelerator.prepare(module, optimizer)
        else:
            self.module, self.optimizer = module.to(self.device), optimizer
        if self.uses_deepspeed:
            numbers = {"micro_batch_size": self.micro_batch_size, "accumulation": self.accumulation}
            zero.undo_first_step(self.module)
            zero.check_resolved(self.module, **numbers, world_size=self.world_size, clip=self.clip)
        logger.info("%s", self.description)

    @property
    def description(self) -> str:
        """The numbers that decide what a step is, in one line."""
        size = self.micro_batch_size * self.accumulation * self.world_size
        batch = f"global batch {size} = micro-batch {self.micro_batch_size} x accumulation {self.accumulation}"
        if self.max_tokens is not None:
            batch = f"global batch {size} packed in pieces of at most {self.max_tokens} tokens"
        clipping = f"gradients clipped at norm {self.clip:g}" if self.clip else "gradients not clipped"
        mode = "DDP" if self.world_size > 1 else "one process"
        if self.uses_deepspeed:
            mode = f"DeepSpeed ZeRO-{int(self.module.zero_optimization_stage())}"  # type: ignore[operator]
        # Accelerate's word for fp32 is "no".
        precision = self._accelerator.mixed_precision.replace("no", "fp32")
        return f"{batch} x world size {self.world_size}; {clipping}; {mode}, {precision}"

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision for a forward pass outside the wrapped module."""
        return nullcontext() if self.uses_deepspeed else self._accelerator.autocast()

    def forward_backward(self, batch: dict[str, Any], *, count: Tensor, last: bool) -> Tensor:
        """Forward and backward of one micro-batch.

        Args:
            batch: Tensors on the device.
            count: Global weight of the whole step (rows or supervised tokens), scalar.
            last: Whether this is the step's last micro-batch, at which gradients are exchanged.

        Returns:
            The loss sum of this micro-batch, scalar, detached.
        """
        # A step in which nothing is supervised gives a loss of 0 and no NaN.
        divisor = count.clamp(min=1).float()
        if self.uses_deepspeed:
            # Told each time: packed steps differ in their number of micro-batches, which DeepSpeed's own count does not know.
            self.module.set_gradient_accumulation_boundary(is_boundary=last)  # type: ignore[operator]
            loss_sum = self.module(batch)
            self.module.backward(loss_sum * self.world_size / divisor, scale_wrt_gas=False)  # type: ignore[operator]
            return loss_sum.detach().float()
        # Gradients are exchanged once a step, or DDP would do it after every micro-batch.
        wait = nullcontext() if last or self.world_size == 1 else self.module.no_sync()  # type: ignore[operator]
        with wait:
            with self.autocast():
                loss_sum = self.module(batch)
            # Outside autocast, as torch advises: backward takes the dtypes that forward chose.
            (loss_sum * self.world_size / divisor).backward()
        return loss_sum.detach().float()

    def gradient_norm(self) -> Tensor | None:
        """Global norm before clipping; gradients are clipped in place. None where DeepSpeed does it inside its step."""
        if self.uses_deepspeed:
            return None
        parameters = [p for p in self.module.parameters() if p.requires_grad and p.grad is not None]
        # Norm and clipping apart: without clipping the gradients are read once and not multiplied by 1.
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        return norm

    def update(self, lr_scale: float, *, broken: Tensor) -> Tensor:
        """One optimizer step at ``lr_scale`` x the base learning rate of each group; clears the gradients.

        Args:
            lr_scale: Factor on the base learning rates.
            broken: bool scalar on the device, the same on all processes. Where it is true the weights stay as they are, now and
                at every later step: the host hears of it a step late, and must find the weights from before.

        Returns:
            DeepSpeed's gradient norm, infinite where it left the update out; 0 where :meth:`gradient_norm` gave it.
        """
        for group in self.optimizer.param_groups:
            # From the base rate and not from the last one: what a loaded optimizer state says of lr has no effect.
            group["lr"] = group["base_lr"] * lr_scale
        self._broken = broken.float() if self._broken is None else torch.maximum(self._broken, broken.float())
        if self.uses_deepspeed:
            return zero.update(self.module, self._broken, self.device)
        # The fused AdamW's own switch, made for loss scaling: the decision stays on the device.
        getattr(self.optimizer, "optimizer", self.optimizer).found_inf = self._broken
        self.optimizer.step()
        # None and not zeros: a pass over all gradients less, and unused ones stay recognisable.
        self.optimizer.zero_grad(set_to_none=True)
        return torch.zeros((), device=self.device)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes."""
        if self.world_size == 1:
            return tensor
        result: Tensor = self._accelerator.reduce(tensor, reduction="sum")
        return result

    def sum_later(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Start to sum over all processes.

        Args:
            tensor: Summed in place; leave it alone until then.

        Returns:
            A function that waits (on the GPU the stream, not the host) and returns the sum.
        """
        if self.world_size == 1:
            return lambda: tensor
        # Straight to torch: Accelerate has no reduction that can be waited for later.
        work = torch.distributed.all_reduce(tensor, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return tensor

        return finish

    def numbers(self, *values: float) -> Tensor:
        """Numbers of the host as float64 on the device, without waiting for it."""
        # Pinned on a GPU: from pageable memory even a copy that need not block does.
        found = torch.tensor(values, dtype=torch.float64)
        return found.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else found.to(self.device)

    def barrier(self) -> None:
        """Wait for all processes, as long as it takes; a process that is lost ends the waiting all the same."""
        if self._store is None:
            return
        # By the store and not by a collective, which has a timeout: rank 0 may extract features or save for hours.
        # Numbered, because a barrier that has opened stays open in the store.
        self._meetings += 1
        key = f"barrier/{self._meetings}"
        if self._store.add(key, 1) == self.world_size:
            self._store.set(f"{key}/open", "1")
        self._store.wait([f"{key}/open"], datetime.timedelta(days=30))

    def main_first(self, work: Callable[[], Any]) -> Any:
        """Do something on the main process, then on the others (which find its cached result)."""
        if self.is_main:
            found = work()
            self.barrier()
            return found
        self.barrier()
        return work()

    def on_main(self, work: Callable[[], None]) -> None:
        """Do something on the main process only; where it cannot be done, all processes end alike.

        Raises:
            InputError: What the main process raised.
        """
        told: list[str] = []
        error: InputError | None = None
        if self.is_main:
            try:
                work()
            except InputError as caught:
                error = caught
                told = [str(caught)]
        # First without a timeout: saving a product may take long.
        self.barrier()
        # Gathered, or the others would go on to wait for a process that is gone.
        told = self.gather(told)
        if told:
            raise error or InputError(told[0])

    def explain(self, error: RuntimeError) -> RuntimeError:
        """What an error really means: :class:`LostError` where another process is gone, the error itself otherwise."""
        return error if self._liveness is None else self._liveness.explain(error)

    def unwrapped(self) -> nn.Module:
        """The objective itself."""
        model: nn.Module = self._accelerator.unwrap_model(self.module)
        return model

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All weights whole on every process inside the block (ZeRO-3 keeps them in pieces otherwise); a collective call."""
        # Only ZeRO-3 marks parameters so; under ZeRO-1 and 2 they are whole anyway.
        parts = [p for p in self.module.parameters() if hasattr(p, "ds_id")]
        if not parts:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(parts):
            yield

    @contextmanager
    def whole_on_main(self) -> Iterator[None]:
        """All weights whole on the main process inside the block, in host memory (a collective call); for saving the product.

        Unlike :meth:`gathered` no device and no other process holds more than one whole parameter at a time.
        """
        parts = [p for p in self.module.parameters() if hasattr(p, "ds_id")]
        kept = skeleton.collect(parts, keep=self.is_main)
        yield
        for parameter, piece in kept:
            parameter.data = piece

    def gather(self, rows: list[Any]) -> list[Any]:
        """The rows of all processes, in order of rank."""
        if self.world_size == 1:
            return rows
        from accelerate.utils import gather_object

        found: list[Any] = gather_object(rows)
        return found

    def gather_features(self, features: Tensor) -> tuple[Tensor, int]:
        """The features of all processes with gradient, for losses that compare samples across them.

        The gradient of a feature is the sum of what all processes give it, so local losses summed over the processes have
        exactly the gradient of the global loss (open_clip's ``gather_with_grad`` with ``local_loss``).

        Args:
            features: float[B, E]; B equal on all processes.

        Returns:
            float[world * B, E], and the row at which this process's own begin.
        """
        # Without a copy, so that one process pays nothing for what several need.
        if self.world_size == 1:
            return features, 0
        gathered: Tensor = AllGather.apply(features)
        return gathered, self.rank * len(features)

    def snapshot(self) -> tuple[list[StateFile], bool]:
        """Trainable weights, buffers and optimizer state, to be written later (a collective call).

        Returns:
            The files that this process has to write, and whether they hold copies. Without copies, for which the host had no
            memory, they must be written before training goes on.
        """
        copied = True

        def take(state: Any, name: str) -> Any:
            nonlocal copied
            if not self._copies.has(name) and not room_for(state_size(state)):
                copied = False
                return state
            return self._copies.of(state, name)

        states: dict[str, Any] = {}
        if self.uses_deepspeed and (self.is_main or zero.is_partitioned(self.module)):
            buffers = changing_buffers(self.unwrapped()) if self.is_main else {}
            states[f"pieces-{self.rank:05d}.safetensors"] = pack(self._shares(), self._inner_optimizer, buffers)
        elif self.is_main and not self.uses_deepspeed:
            names = {id(p): name for name, p in self.unwrapped().named_parameters()}
            order = [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
            states["model.safetensors"] = _changing_state(self.unwrapped())
            # Torch numbers the states; with the names another mode can read them too.
            states["optimizer.pt"] = {**self.optimizer.state_dict(), "names": order}
        files = [StateFile(name, take(state, name)) for name, state in states.items()]
        self._copies.finish(self.device)
        return files, copied

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer itself, out of what Accelerate and DeepSpeed put around it."""
        if self.uses_deepspeed:
            inner: Any = self.module.basic_optimizer
        else:
            inner = getattr(self.optimizer, "optimizer", self.optimizer)
        assert isinstance(inner, torch.optim.Optimizer)
        return inner

    def _shares(self) -> list[Share]:
        """What this process holds of the trainable parameters."""
        if self.uses_deepspeed:
            return zero.shares(self.module)
        return zero.whole_shares([(name, p) for name, p in self.unwrapped().named_parameters() if p.requires_grad])

    def load(self, folder: Path) -> None:
        """Read the files of :meth:`snapshot`, whichever mode and number of processes wrote them.

        Raises:
            InputError: The checkpoint holds other parameters, or is damaged.
        """
        if not self.uses_deepspeed and (folder / "model.safetensors").is_file():
            self._load_plain(folder)
            return
        module = self.unwrapped()
        saved = Saved(folder)
        saved.check({name for name, p in module.named_parameters() if p.requires_grad})
        unpack(saved, self._shares(), self._inner_optimizer)
        saved.fill_buffers(module)
        if self.uses_deepspeed:
            zero.refresh(self.module)

    def _load_plain(self, folder: Path) -> None:
        """Read what one process or DDP wrote, as one process or DDP."""
        from safetensors.torch import load_file

        # Accelerate numbers CPUs too, which safetensors does not know.
        device = "cpu" if self.device.type == "cpu" else str(self.device)
        state = load_file(folder / "model.safetensors", device=device)
        expected = _changing_state(self.unwrapped())
        # Strict about what changes in training; frozen weights come from the parent again.
        if state.keys() != expected.keys():
            raise InputError("checkpoint holds other parameters than the model", where=folder, mend="--restart")
        self.unwrapped().load_state_dict(state, strict=False)
        # weights_only: a checkpoint is data, it must not be able to run code.
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location=device, weights_only=True))

    def close(self) -> None:
        """Leave the process group, so that another run in this process can choose another mode."""
        from accelerate.state import AcceleratorState

        if self.uses_deepspeed:
            zero.forget_groups(self.module)
        self._accelerator.end_training()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if self._liveness is not None:
            # Last: groups may ask the store in rank 0 while they end, and rank 0 is free to go after the goodbyes.
            self._liveness.close()
        AcceleratorState._reset_state(True)
        # Left behind, it would choose DeepSpeed for the next Accelerator too.
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def _changing_state(module: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and persistent buffers: what training can change. Tied tensors once."""
    changing = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    changing |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict().items():
        # safetensors refuses two names for one memory; empty tensors share the address 0 and are not meant.
        # Not by what is frozen: a layer of 4-bit weights has entries here that are neither parameters nor buffers.
        if name not in changing or (tensor.data_ptr() in seen and tensor.numel()):
            continue
        seen.add(tensor.data_ptr())
        found[name] = tensor.contiguous()
    return found
