"""Shares of parameters to files and back, cut differently each time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmkit.distributed.pieces import Saved, Share, pack, unpack
from mmkit.errors import InputError

NAMES = ["a", "b"]
SHAPES = [(3, 4), (5,)]
SIZES = [12, 5]


def flats(cut: int) -> list[torch.Tensor]:
    """Flat memory of two processes for both parameters one behind the other, ``cut`` numbers on the first."""
    return [torch.zeros(cut), torch.zeros(sum(SIZES) - cut)]


def shares(rank: int, cut: int, memory: list[torch.Tensor]) -> list[Share]:
    """What a process holds of them."""
    begin, end = (0, cut) if rank == 0 else (cut, sum(SIZES))
    found, at = [], 0
    for name, size in zip(NAMES, SIZES, strict=True):
        first, last = max(begin, at), min(end, at + size)
        if first < last:
            part = memory[rank].narrow(0, first - begin, last - first)
            found.append(Share(name, first - at, part, memory[rank], first - begin))
        at += size
    return found


def write(folder: Path, cut: int) -> None:
    """A checkpoint of two processes: weights 0, 1, ..., moments ten times that, three updates done."""
    memory = flats(cut)
    values = torch.arange(float(sum(SIZES)))
    for rank, flat in enumerate(memory):
        flat.copy_(values[:cut] if rank == 0 else values[cut:])
        optimizer = torch.optim.AdamW([flat.requires_grad_()])
        optimizer.state[flat].update(step=torch.tensor(3.0), exp_avg=flat.detach() * 10, exp_avg_sq=flat.detach() * 100)
        buffers = {"n": torch.tensor([7])} if rank == 0 else {}
        owned = [Share(s.name, s.start, s.weight, flat, s.offset) for s in shares(rank, cut, [f.detach() for f in memory])]
        content = pack(owned, optimizer, buffers)
        save_file({k: v.contiguous().clone() for k, v in content.items()}, folder / f"pieces-{rank:05d}.safetensors")


@pytest.mark.parametrize("written", [1, 8, 12, 15])
@pytest.mark.parametrize("read", [3, 12, 16])
def test_pieces_are_read_by_processes_that_are_cut_elsewhere(tmp_path, written, read):
    write(tmp_path, written)
    saved = Saved(tmp_path)
    assert (saved.names, saved.kinds) == (set(NAMES), {"weight", "exp_avg", "exp_avg_sq"})
    memory, values = flats(read), torch.arange(float(sum(SIZES)))
    for rank, flat in enumerate(memory):
        optimizer = torch.optim.AdamW([flat.requires_grad_()])
        owned = [Share(s.name, s.start, s.weight, flat, s.offset) for s in shares(rank, read, [f.detach() for f in memory])]
        unpack(saved, owned, optimizer)
        expected = values[:read] if rank == 0 else values[read:]
        assert torch.equal(flat.detach(), expected)
        assert torch.equal(optimizer.state[flat]["exp_avg"], expected * 10)
        assert torch.equal(optimizer.state[flat]["exp_avg_sq"], expected * 100)
        assert float(optimizer.state[flat]["step"]) == 3.0
    # Each counts for itself.
    assert saved.step is not None and optimizer.state[flat]["step"].data_ptr() != saved.step.data_ptr()


def test_a_missing_piece_and_other_parameters_are_refused(tmp_path):
    write(tmp_path, 8)
    (tmp_path / "pieces-00001.safetensors").unlink()
    with pytest.raises(InputError, match="4 numbers of weight of a are missing"):
        Saved(tmp_path).read("weight", "a", 0, 12)
    with pytest.raises(InputError, match=r"other parameters than the model \(c is in the model only\)"):
        Saved(tmp_path).check({"a", "c"})


def test_formats_that_were_given_up_are_refused(tmp_path):
    (tmp_path / "zero").mkdir()
    with pytest.raises(InputError, match="DeepSpeed's own format"):
        Saved(tmp_path)
    (tmp_path / "zero").rmdir()
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match="does not name the parameters"):
        Saved(tmp_path)


def test_reading_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("code of the checkpoint ran",)

    torch.save({"names": Evil()}, tmp_path / "optimizer.pt")
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        Saved(tmp_path)
