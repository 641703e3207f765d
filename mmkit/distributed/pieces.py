"""Checkpoints by parameter: weights and optimizer state in pieces with a name and a place, whoever wrote them.

A ZeRO process holds flat pieces of parameters. They are written as such, each under ``KIND|START|NAME``: what it is of
(``weight`` in fp32, or a state of the optimizer such as ``exp_avg``), the first of the parameter's numbers that it holds, and
the parameter's name. So any number of processes in any mode can read what it needs from them, without DeepSpeed and without
running code. One process and DDP write whole parameters in torch's own layout; :class:`Saved` reads both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.errors import InputError

WEIGHT = "weight"
# Updates that the optimizer has behind it; AdamW's bias correction needs it. The same for all parameters.
STEP = "step"
_BUFFER = "buffer"


@dataclasses.dataclass
class Share:
    """What a process holds of one parameter in training.

    Attributes:
        name: In the objective.
        start: The first of the parameter's numbers, counted flat.
        weight: fp32, flat or in the parameter's shape; a view of what the optimizer changes.
        owner: The tensor that the optimizer keeps its state of.
        offset: Where the share begins in the owner.
    """

    name: str
    start: int
    weight: Tensor
    owner: Tensor
    offset: int

    def of(self, state: Tensor) -> Tensor:
        """The share's part of a state of the owner's shape, a view of it."""
        # A whole parameter need not lie in memory in order.
        return state if self.weight.shape == state.shape else state.view(-1).narrow(0, self.offset, self.weight.numel())


def pack(shares: list[Share], optimizer: torch.optim.Optimizer, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The content of a process's file.

    Args:
        shares: Of this process.
        optimizer: Whose state belongs to the shares' owners.
        buffers: What training changes besides; given by one process only.
    """
    found: dict[str, Tensor] = {f"{_BUFFER}|0|{name}": buffer for name, buffer in buffers.items()}
    for share in shares:
        # Flat: a reader takes any stretch of it.
        found[f"{WEIGHT}|{share.start}|{share.name}"] = share.weight.reshape(-1)
        # Looked for in the wrong place, moments would be lost without a word.
        assert share.owner in optimizer.state, f"the optimizer has no state of {share.name}"
        for kind, state in optimizer.state[share.owner].items():
            if kind == STEP:
                # Without a name: all parameters have made the same number of updates.
                found[f"{STEP}|0|"] = torch.as_tensor(state)
            else:
                found[f"{kind}|{share.start}|{share.name}"] = share.of(state).reshape(-1)
    return found


def unpack(saved: Saved, shares: list[Share], optimizer: torch.optim.Optimizer) -> None:
    """Fill shares and the optimizer's state from a checkpoint, in place.

    Args:
        saved: Of any mode and number of processes.
        shares: Of this process.
        optimizer: Its states are made where there are none yet.
    """
    for share in shares:
        # Exactly its own numbers, wherever the cuts of those who wrote them lie.
        size = share.weight.numel()
        with torch.no_grad():
            share.weight.copy_(saved.read(WEIGHT, share.name, share.start, size).view(share.weight.shape))
        state = optimizer.state[share.owner]
        for kind in saved.kinds - {WEIGHT}:
            if kind not in state:
                # Zeros for what lies between the shares: padding, which no one reads.
                state[kind] = torch.zeros_like(share.owner)
            target = share.of(state[kind])
            target.copy_(saved.read(kind, share.name, share.start, size).view(target.shape))
        if saved.step is not None:
            # Its own for each owner, since the update counts in place; on the device, where the fused one wants it.
            state[STEP] = saved.step.clone().to(share.owner.device)


def changing_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers, which training may change."""
    # Those that are not persistent are in no state dict; they are made with the module.
    kept = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


class Saved:
    """A checkpoint, read piece by piece from its files.

    Attributes:
        names: Parameters that are in it.
        kinds: ``weight`` and the optimizer's states.
        step: Updates of the optimizer; None before the first.
        buffers: By name, whole.
    """

    def __init__(self, folder: Path) -> None:
        """Look what is there.

        Raises:
            InputError: It is of a format that was given up before 0.1.0.
        """
        self.folder = folder
        self.step: Tensor | None = None
        self.buffers: dict[str, Tensor] = {}
        # (kind, name) to pieces: first number, how to read numbers from it.
        self._pieces: dict[tuple[str, str], list[tuple[int, _Source]]] = {}
        if (folder / "zero").is_dir():
            what = "checkpoint is in DeepSpeed's own format, which is no longer read"
            raise InputError(what, where=folder, mend="finish the run with the mmkit that wrote it, or --restart")
        files = sorted(folder.glob("pieces-*.safetensors"))
        for key, source in _sources_in_pieces(files) if files else _sources_in_plain(folder):
            # The name comes last, so nothing in it can be taken for a separator.
            kind, start, name = key.split("|", 2)
            if kind == STEP:
                self.step = source.all()
            elif kind == _BUFFER:
                self.buffers[name] = source.all()
            else:
                self._pieces.setdefault((kind, name), []).append((int(start), source))
        # Whatever states there are: which ones an optimizer keeps is its own matter.
        self.kinds = {kind for kind, _ in self._pieces}
        self.names = {name for _, name in self._pieces}

    def read(self, kind: str, name: str, start: int, size: int) -> Tensor:
        """Numbers ``start`` to ``start + size`` of a parameter's weight or state, float32[size].

        Raises:
            InputError: Some are in no piece.
        """
        found = torch.empty(size)
        missing = size
        for first, source in self._pieces.get((kind, name), []):
            begin, end = max(start, first), min(start + size, first + source.size)
            # No two pieces overlap, since each number is one process's; so counting tells what is missing.
            if begin < end:
                found[begin - start : end - start] = source.part(begin - first, end - first)
                missing -= end - begin
        if missing:
            raise InputError(f"{missing} numbers of {kind} of {name} are missing", where=self.folder, mend="--restart")
        return found

    def check(self, names: set[str]) -> None:
        """Refuse a checkpoint of other parameters than those that train.

        Raises:
            InputError: With the first name that only one of the two has.
        """
        if odd := sorted(names ^ self.names):
            side = "the model only" if odd[0] in names else "the checkpoint only"
            what = f"checkpoint holds other parameters than the model ({odd[0]} is in {side})"
            raise InputError(what, where=self.folder, mend="--restart")

    def fill(self, module: nn.Module) -> None:
        """Put weights and buffers into a whole module, in place; the frozen ones stay.

        Raises:
            InputError: The checkpoint is of other parameters.
        """
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.check(set(trained))
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(self.read(WEIGHT, name, 0, parameter.numel()).view(parameter.shape))
        self.fill_buffers(module)

    def fill_buffers(self, module: nn.Module) -> None:
        """Put the buffers into a module, in place."""
        for name, buffer in changing_buffers(module).items():
            buffer.copy_(self.buffers[name].view(buffer.shape))


class _Source:
    """A flat tensor in a file or in memory, of which any part can be read."""

    def __init__(self, size: int, opened: Any, key: str) -> None:
        self.size, self._opened, self._key = size, opened, key

    def part(self, begin: int, end: int) -> Tensor:
        """Numbers ``begin`` to ``end``."""
        # Only these bytes are read from the disk: a process needs a part of each file.
        part: Tensor = self._opened.get_slice(self._key)[begin:end]
        return part

    def all(self) -> Tensor:
        """The tensor in its own shape and type."""
        whole: Tensor = self._opened.get_tensor(self._key)
        return whole


class _InMemory(_Source):
    """A tensor of any shape that is in memory (or mapped into it) already."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.numel(), None, "")
        self._tensor = tensor

    def part(self, begin: int, end: int) -> Tensor:
        """Numbers ``begin`` to ``end``, counted flat."""
        return self._tensor.reshape(-1)[begin:end]

    def all(self) -> Tensor:
        """The tensor itself."""
        return self._tensor


def _sources_in_pieces(files: list[Path]) -> Iterator[tuple[str, _Source]]:
    """Keys and sources of ZeRO processes' files."""
    from safetensors import safe_open

    for file in files:
        opened = safe_open(file, framework="pt")
        for key in opened.keys():  # noqa: SIM118 - it is no dictionary
            # Shapes are in the file's header: nothing is read yet.
            yield key, _Source(_size(opened.get_slice(key).get_shape()), opened, key)


def _size(shape: list[int]) -> int:
    """Numbers in a tensor of a shape."""
    return int(torch.Size(shape).numel())


def _sources_in_plain(folder: Path) -> Iterator[tuple[str, _Source]]:
    """Keys and sources of what one process or DDP wrote."""
    from safetensors.torch import load_file

    # weights_only: a checkpoint is data, it must not be able to run code.
    optimizer = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
    if "names" not in optimizer:
        what = "checkpoint does not name the parameters of its optimizer state"
        raise InputError(what, where=folder, mend="finish the run with the mmkit that wrote it, or --restart")
    names: list[str] = optimizer["names"]
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        yield f"{WEIGHT if name in set(names) else _BUFFER}|0|{name}", _InMemory(tensor)
    for index, states in optimizer["state"].items():
        for kind, state in states.items():
            yield f"{kind}|0|{'' if kind == STEP else names[index]}", _InMemory(torch.as_tensor(state))
