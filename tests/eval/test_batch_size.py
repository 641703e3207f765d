from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from mmkit.eval import batch_size
from mmkit.eval.batch_size import fitting, is_out_of_memory, row_bytes

VICUNA = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008, vocab_size=32000)


def test_a_row_of_vicuna_takes_what_the_arithmetic_says():
    # 2 x 33 layers x 4096 x 2 bytes a token of keys and values, a layer's 6 x 4096 + 3 x 11008 numbers, scores twice.
    assert row_bytes(VICUNA, 640, 2) == 640 * (2 * 33 * 4096 * 2 + 2 * (6 * 4096 + 3 * 11008)) + 8 * 32000
    # GPT-2's names of the same sizes.
    assert row_bytes(GPT2Config(n_embd=768, n_layer=12, n_head=12), 10, 4) == 10 * (2 * 13 * 768 * 4 + 4 * 18 * 768) + 8 * 50257


def test_the_largest_power_of_two_that_fits(monkeypatch):
    cpu, each = torch.device("cpu"), row_bytes(VICUNA, 640, 4)
    for room, expected in ((1000 * each, 64), (21 * each, 16), (each, 1), (0, 1)):
        monkeypatch.setattr(batch_size, "room_for", lambda size, room=room: size <= room)
        assert fitting(VICUNA, 640, itemsize=4, beams=1, device=cpu) == expected
    monkeypatch.setattr(batch_size, "room_for", lambda size: size <= 21 * each)
    assert fitting(VICUNA, 640, itemsize=4, beams=5, device=cpu) == 4


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
            ),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
    ],
)
def test_what_says_that_memory_is_out(error, expected):
    assert is_out_of_memory(error) is expected


def test_the_cpus_own_allocator_says_it_so():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
