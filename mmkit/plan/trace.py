"""A training step without memory: which bytes it holds and which operations it executes, from running it on fake tensors.

A fake tensor has shape and dtype and no content (``torch._subclasses.FakeTensorMode``, what torch.compile traces with). The real
modules run on them, forward and backward, and a dispatch mode sees every operator: what it allocates, when that is freed, and
how many floating-point operations it is. So checkpointing, LoRA layers and autocast need no formula here: they are what the
modules do. Attention runs as torch's fused CPU kernel, which keeps what flash attention keeps on a GPU: its output and a number
a row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

# Their result is as long as a mask has true places: content, which fake tensors lack (DynamicOutputShapeException).
_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_)
# Autocast makes them of fp32 weights, once a pass, and backward needs them again.
COPIES = "bf16 copies of weights"
OTHER = "loss, masks and inputs"


@dataclasses.dataclass(frozen=True)
class Trace:
    """What one forward and backward pass of a micro-batch does on one process.

    Attributes:
        saved: Bytes alive between forward and backward, by part; weights and their gradients are not among them.
        peak: Most such bytes alive at any time of the two passes.
        forward: Floating-point operations of the forward pass by part; a multiplication and an addition are two.
        backward: Those of the backward pass, without what checkpointing computes again.
        recomputed: Those that checkpointing computes again.
    """

    saved: dict[str, int]
    peak: int
    forward: dict[str, int]
    backward: int
    recomputed: int

    @property
    def held(self) -> int:
        """Bytes alive between forward and backward."""
        return sum(self.saved.values())

    @property
    def executed(self) -> int:
        """All operations of a step, recomputation included."""
        return sum(self.forward.values()) + self.backward + self.recomputed


def fake(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn a module of the meta device into one of fake CPU tensors, in place.

    Args:
        module: Built under ``torch.device("meta")``.
        mode: Owner of the new tensors.
        dtype: Of floating parameters, as DeepSpeed casts them; None keeps each one's own.

    Returns:
        The same module.
    """
    made: dict[int, Tensor] = {}

    def stand_in(old: Tensor) -> Tensor:
        kind = dtype if dtype is not None and old.is_floating_point() else old.dtype
        # By identity, so that a tied weight stays one weight.
        if id(old) not in made:
            # On the "CPU": its fused attention is an operator of known size, and no GPU need be there.
            new = torch.empty(old.shape, dtype=kind, device="cpu")
            made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        return made[id(old)]

    with mode:
        for part in module.modules():
            # Not nn.Module.to_empty: it unties weights, and VisionEncoder makes buffers of content on the way.
            tables: list[dict[str, Any]] = [part._parameters, part._buffers]
            for table in tables:
                table.update({name: stand_in(value) for name, value in table.items() if value is not None})
    return module


def trace(
    module: nn.Module,
    loss: Callable[[], Tensor],
    mode: FakeTensorMode,
    *,
    parts: Mapping[str, str],
    autocast: bool,
    chosen: float = 1.0,
) -> Trace:
    """Run a forward and a backward pass and count.

    Args:
        module: What :func:`fake` gave, in training mode.
        loss: Makes the inputs and returns the loss, scalar with gradient.
        mode: Owner of the module's tensors.
        parts: Name of a submodule -> name of the part that its bytes and operations are told under; the innermost one counts.
        autocast: Whether products run in bf16 over fp32 weights.
        chosen: Share of its positions that a boolean index picks: how many it would be says the content, which there is none of.

    Returns:
        The counts.
    """
    counter = _Counter(module, chosen)
    with contextlib.ExitStack() as stack:
        for handle in _watch(module, parts, counter):
            stack.callback(handle.remove)
        for parameter in module.parameters():
            if parameter.requires_grad:
                # A gradient is counted with the model's states, and goes from here as soon as it is whole.
                handle = parameter.register_post_accumulate_grad_hook(counter.drop_gradient)
                stack.callback(handle.remove)
        stack.enter_context(mode)
        stack.enter_context(_NoDropout())
        # Last, so that it sees every operator before the fake mode carries it out.
        stack.enter_context(counter)
        # CPU autocast: its rules for products, norms and losses are CUDA's for all that these models do.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = loss()
        # Between the passes: what is alive now is what backward needs.
        counter.turn()
        found.backward()
    return Trace(
        saved=dict(counter.saved()),
        peak=counter.peak(),
        forward=dict(counter.flops["forward"]),
        backward=sum(counter.flops["backward"].values()),
        recomputed=sum(counter.flops["recomputed"].values()),
    )


def _watch(module: nn.Module, parts: Mapping[str, str], counter: _Counter) -> Iterator[Any]:
    """Hooks by which the counter knows the part that runs."""
    named = dict(module.named_modules())
    for name, part in parts.items():
        # A part that the model has not (Identity in place of a norm, say) simply never runs.
        if name in named:
            yield named[name].register_forward_pre_hook(lambda *_, part=part: counter.enter(part))
            # always_call: checkpointing ends a recomputation by an exception as soon as it has what backward asks for.
            yield named[name].register_forward_hook(lambda *_: counter.leave(), always_call=True)


class _NoDropout(TorchFunctionMode):
    """Attention without dropout: flash attention drops inside its kernel and stores a seed, the CPU's falls back to n² copies."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a torch function."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
            # By position it is the fifth argument, behind query, key, value and mask.
            args = args[:4] + args[5:] if len(args) > 4 else args
        return func(*args, **kwargs)


class _Counter(TorchDispatchMode):
    """Bytes of tensors that are alive, and operations, by part.

    Allocations and releases are written down in order and added up at the end: only then is it known which of them have become
    gradients (a fused loss makes the head's in its forward pass).
    """

    def __init__(self, module: nn.Module, chosen: float) -> None:
        super().__init__()
        self.phase, self.chosen = "forward", chosen
        self.flops: dict[str, Counter[str]] = {name: Counter() for name in ("forward", "backward", "recomputed")}
        self._running: list[str] = []
        # What was allocated, in order: (bytes, part). An event is the number of one, or -1 - number when it is freed.
        self._made: list[tuple[int, str]] = []
        self._events: list[int] = []
        self._half = 0
        self._gradients: set[int] = set()
        # Storage by its address -> its number. Weights are known from the start and weigh nothing.
        self._alive: dict[int, int] = {}
        tensors = [*module.parameters(), *module.buffers()]
        self._weights = {t.untyped_storage()._cdata for t in tensors}

    def turn(self) -> None:
        """The forward pass is over."""
        self.phase, self._half = "backward", len(self._events)

    def drop_gradient(self, parameter: Tensor) -> None:
        """A weight's gradient is whole: no temporary, and gone."""
        assert parameter.grad is not None
        number = self._alive.get(parameter.grad.untyped_storage()._cdata)
        if number is not None:
            self._gradients.add(number)
        parameter.grad = None

    def enter(self, part: str) -> None:
        """A module of a part begins."""
        self._running.append(part)

    def leave(self) -> None:
        """It ends."""
        self._running.pop()

    def saved(self) -> Counter[str]:
        """Bytes alive between the passes, by part."""
        found: Counter[str] = Counter()
        for event in self._events[: self._half]:
            number = event if event >= 0 else -1 - event
            size, part = self._made[number]
            if number not in self._gradients:
                found[part] += size if event >= 0 else -size
        # Without the parts of which nothing is left.
        return +found

    def peak(self) -> int:
        """Most bytes alive at one time."""
        now = most = 0
        for event in self._events:
            number = event if event >= 0 else -1 - event
            if number not in self._gradients:
                now += self._made[number][0] if event >= 0 else -self._made[number][0]
                most = max(most, now)
        return most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            # Checks of the content, such as that there are as many image tokens as features: they hold.
            return True
        if func._overloadpacket in _INDEXING:
            args = (args[0], self._known_length(args[1]), *args[2:])
        out = func(*args, **kwargs)
        part = self._running[-1] if self._running else OTHER
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights:
            part = COPIES
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._note(value, part)
        count = _flops(func, args, kwargs, out)
        if count:
            # Modules run in backward only where checkpointing computes them again.
            phase = "recomputed" if self.phase == "backward" and self._running else self.phase
            self.flops[phase][part] += count
        return out

    def _known_length(self, indices: Any) -> list[Tensor | None]:
        """The indices of an operator, a boolean one as that many numbers as it is supposed to pick."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype != torch.bool:
                found.append(index)
            else:
                # One list of numbers for each of its dimensions.
                found += [index.new_zeros(round(self.chosen * index.numel()), dtype=torch.int64)] * index.ndim
        return found

    def _note(self, tensor: Tensor, part: str) -> None:
        """Write down a storage that was not there before, and when it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._weights:
            return
        number = self._alive[key] = len(self._made)
        self._made.append((storage.nbytes(), part))
        self._events.append(number)
        # Of the storage and not of the tensor: views share one, and it goes with the last of them.
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        """A storage is gone; its address may come again."""
        self._events.append(-1 - self._alive.pop(key))


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Operations of an operator; 0 for all but products and attention, as ``torch.utils.flop_counter`` counts."""
    packet = func._overloadpacket
    # torch's registry lacks the CPU's fused attention (2.14). Its arguments: query, key, value, dropout_p, is_causal.
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        query, key, value = (t.shape for t in args[:3])
        causal = args[4] if len(args) > 4 else kwargs.get("is_causal", False)
        # Kernels leave out the half above the diagonal where the mask is no tensor.
        return int(sdpa_flop_count(query, key, value)) // (2 if causal else 1)
    # Five products to the four of plain attention: fused kernels compute the scores again.
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        # Behind these come output, logsumexp, dropout_p, is_causal.
        gradient, query, key, value = (t.shape for t in args[:4])
        causal = args[7] if len(args) > 7 else kwargs.get("is_causal", False)
        return int(sdpa_backward_flop_count(gradient, query, key, value)) // (2 if causal else 1)
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
