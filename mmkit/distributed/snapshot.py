"""State of a run copied to host memory, to be written to files while training goes on."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mmkit.files import sync


@dataclasses.dataclass(frozen=True)
class StateFile:
    """A file of a checkpoint that is still to be written.

    Attributes:
        name: Relative to the checkpoint; ``.safetensors`` chooses that format, anything else is torch's own.
        state: Tensors by name, or what torch.save takes.
    """

    name: str
    state: Any

    def write(self, folder: Path) -> None:
        """Write and flush to the disk.

        Raises:
            OSError: The disk is full, read-only or broken.
        """
        path = folder / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            # Its own writer: an error of the system comes with its number in the text, which disk_trouble() reads.
            save_file(self.state, path)
        else:
            with path.open("wb") as file:
                noting: Any = _Noting(file)
                try:
                    # To a file of Python's: torch writing to a path says "file write failed" of a full disk and no more.
                    torch.save(self.state, noting)
                except RuntimeError:
                    if noting.error is not None:
                        raise noting.error from None
                    raise
        sync(path)


class _Noting:
    """A file that remembers why a write failed; torch makes an error without a reason of it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write ``data``."""
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Hand over what is buffered."""
        self._file.flush()


class HostCopies:
    """Copies of tensors in host memory that is kept from one snapshot to the next."""

    # Kept: the first touch of fresh pages (or pinning them) costs more than the copy, and the peak is the same.
    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def has(self, name: str) -> bool:
        """Whether a value of this name was copied before, so that its memory is there."""
        return any(kept.startswith(f"{name}/") for kept in self._kept)

    def of(self, value: Any, name: str) -> Any:
        """A value with all its tensors copied; on a GPU the copies are on their way until :meth:`finish`.

        Args:
            value: Tensors in any nesting of dictionaries, lists and tuples.
            name: Tells the places of two values apart.
        """
        if isinstance(value, Tensor):
            return self._tensor(value.detach(), name)
        if isinstance(value, Mapping):
            # Plain dictionaries: a state dict's own class carries metadata that nothing reads again.
            return {key: self.of(part, f"{name}/{key}") for key, part in value.items()}
        # A named tuple would need its fields by name; none occurs in a state.
        if isinstance(value, list | tuple):
            return type(value)(self.of(part, f"{name}/{i}") for i, part in enumerate(value))
        # Small settings objects, which training may go on to change.
        return copy.deepcopy(value)

    def _tensor(self, tensor: Tensor, name: str) -> Tensor:
        kept = self._kept.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            # From a GPU the copy can only run by itself into memory that the system does not move.
            pinned = tensor.device.type == "cuda"
            kept = self._kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
        return kept.copy_(tensor, non_blocking=True)

    def finish(self, device: torch.device) -> None:
        """Wait for the copies; the next update would otherwise change what is still being read."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def room_for(size: int) -> bool:
    """Whether the host can spare ``size`` bytes on each process of this machine."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        # No such file outside Linux; the copy is then tried.
        return True
    # What the file calls kB are KiB.
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    free = min([free, *_spare_of_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])
    # All processes of the machine copy at the same time; half, because data loaders grow too.
    return size * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < free // 2


def _spare_of_groups(membership: Path, root: Path) -> list[int]:
    """Bytes that this process's control group and those around it may still take, where they have a limit (cgroup v2).

    A container or a scheduler's job sees the memory of the whole machine, and is killed at its own limit.
    """
    try:
        own = next(line.partition("::")[2] for line in membership.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    spare = []
    place = root / own.strip("/")
    for folder in [place, *place.parents]:
        if folder.is_relative_to(root):
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max" is no limit
                spare.append(int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text()))
    return spare


def state_size(value: Any) -> int:
    """Bytes of all tensors in a value."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(state_size(part) for part in value.values())
    return sum(state_size(part) for part in value) if isinstance(value, list | tuple) else 0
