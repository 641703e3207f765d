"""The benchmarks run, compare like with like, and count what they say they count. No test looks at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmkit.bench import BENCHMARKS, run_bench
from mmkit.bench.measure import _peak_of_temporaries, interleaved, peak_bytes
from mmkit.errors import InputError


def test_loss_against_its_peers() -> None:
    found = run_bench(
        "superclass-loss", {"batch": "32", "width": "16", "vocab_size": "500", "labels": "4", "chunk_rows": "8", "repeats": "1"}
    )
    assert found["largest gradient difference"] < 1e-6
    # One chunk of logits here, at least three full matrices there.
    assert found["mmkit MiB"] * 2**20 < 3 * 8 * 500 * 4 and found["memory, mmkit / published"] < 0.2
    assert {"time, mmkit / published", "time, mmkit / torch", "memory, mmkit / torch"} <= found.keys()
    assert "B=32 D=16 V=500" in found["conditions"]


@pytest.mark.parametrize("kind", ["bce", "two_way"])
def test_other_kinds_and_precisions(kind: str) -> None:
    found = run_bench(
        "superclass-loss",
        {"batch": "8", "width": "8", "vocab_size": "50", "labels": "3", "kind": kind, "precision": "bf16", "repeats": "1"},
    )
    assert kind in found["conditions"] and "bf16" in found["conditions"] and "largest gradient difference" not in found


@pytest.mark.slow
def test_a_step_counts_the_operations_of_both_sides() -> None:
    small = {"architecture": "vit_small_patch16_224", "peer": "ViT-S-16", "batch": "2", "repeats": "1"}
    found = run_bench("superclass-step", small)
    # By arithmetic 27.5 + 0.1 GFLOP a picture, and 1.37 times that for CLIP.
    assert found["superclass GFLOP a picture"] == pytest.approx(27.6, rel=0.02)
    assert found["bound by FLOPs"] == pytest.approx(1.37, rel=0.02)
    half = run_bench("superclass-step", {**small, "patch_drop": "0.5"})
    assert half["superclass GFLOP a picture"] < 0.52 * found["superclass GFLOP a picture"]
    assert half["bound by FLOPs"] == pytest.approx(1.75, rel=0.02)


def test_peak_memory_is_that_of_temporaries() -> None:
    device = torch.device("cpu")

    def work() -> torch.Tensor:
        big = torch.ones(1 << 20)  # 4 MiB
        other = big + 1  # 8 MiB alive
        del big
        return other[:8].clone() + torch.ones(1 << 18).sum()

    assert peak_bytes(work, device) == pytest.approx(8 * 2**20, rel=0.01)
    assert peak_bytes(lambda: torch.ones(1 << 20), device) == 0  # what is returned does not count
    assert _peak_of_temporaries([100, 50, -50, 30, -100]) == 150 and _peak_of_temporaries([100]) == 0


def test_contenders_take_turns() -> None:
    order: list[str] = []
    found = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2)
    assert order == ["a", "b"] * 3 and found.keys() == {"a", "b"} and min(found.values()) >= 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("superclass", {}, r"no benchmark 'superclass'.*superclass-loss"),
        ("superclass-loss", {"batches": "3"}, r"no setting 'batches'.*batch"),
        ("superclass-loss", {"batch": "many"}, "batch=many is no int"),
        ("superclass-step", {"compile": "maybe"}, "compile=maybe is no bool"),
    ],
)
def test_wrong_settings_are_refused(name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_bench(name, options)


def test_every_benchmark_can_be_imported() -> None:
    import importlib

    for module in BENCHMARKS.values():
        assert callable(importlib.import_module(f"mmkit.bench.{module}").run)


def test_the_language_model_loss_keeps_no_full_logits() -> None:
    small = {"batch": "2", "length": "64", "width": "16", "vocab_size": "2000", "chunk_rows": "8", "repeats": "1"}
    found = run_bench("lm-loss", small)
    assert found["largest gradient difference"] < 1e-5
    # A chunk of logits here; there all of them in float32 at least once.
    assert found["full logits MiB"] * 2**20 > 2 * 64 * 2000 * 4 and found["memory, mmkit / full logits"] < 1 / 3
    assert (
        "B=2 T=64 D=16 V=2000" in found["conditions"]
        and "bf16" in run_bench("lm-loss", {**small, "precision": "bf16"})["conditions"]
    )


def test_packing_computes_the_same_loss_without_padding(tmp_path) -> None:
    small = {"samples": "16", "micro_batch": "4", "world_size": "2", "max_tokens": "2000", "max_length": "1000", "repeats": "1"}
    found = run_bench("packing", {**small, "width": "64", "vocab_size": "200"})
    assert found["largest difference of the loss"] < 1e-5
    assert found["packed padding"] == 0 < found["length-grouped padding"] < found["modality-grouped padding"] < 1
    assert "assumed lengths" in found["conditions"]
    np.savez(tmp_path / "lengths.npz", tokens=np.arange(20, 60, dtype=np.int32), text_only=np.arange(40) % 3 == 0)
    mine = run_bench("packing", {**small, "width": "64", "vocab_size": "200", "lengths": str(tmp_path / "lengths.npz")})
    assert "file" in mine["conditions"] and mine["packed padding"] == 0
    with pytest.raises(InputError, match="17 samples are no multiple of the global batch 8"):
        run_bench("packing", {**small, "samples": "17"})
    with pytest.raises(InputError, match="fewer than 48"):
        run_bench("packing", {**small, "samples": "48", "lengths": str(tmp_path / "lengths.npz")})
