"""Every DeepSpeed mode goes on bit-equal from a checkpoint that was written in the background and read without running code."""

from __future__ import annotations

import json
import shutil

import pipeline
import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed on CPUs and CUDA do not mix in one environment"),
]


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16"), (3, "fp32")])
def test_zero_goes_on_bit_equal(zygote, tmp_path, stage, precision):
    run, log, settings = tmp_path / "run", tmp_path / "log", tmp_path / "zero.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    more = ["train.steps=4", "train.checkpoint_every=2", f"train.precision={precision}", f"train.deepspeed={settings}"]
    arguments = pipeline.clipcap(run, *more, "track.kind=none")
    for expected in ("run", "again"):
        codes = [zygote.wait(pid) for pid in zygote.start(arguments, log, processes=2)]
        assert codes == [0, 0], (expected, log.read_text()[-3000:])
        if expected == "run":
            before, rows = pipeline.weights(run), pipeline.rows(run / "metrics.jsonl")
            shutil.rmtree(run / "model")
            shutil.rmtree(run / "checkpoints" / "step-00000004")
            (run / "manifest.json").write_text(json.dumps({**pipeline.manifest(run), "status": "running"}))
    assert "going on from the checkpoint at step 2 of 4" in log.read_text()
    after = pipeline.weights(run)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert [(r["loss"], r["grad_norm"]) for r in pipeline.rows(run / "metrics.jsonl")] == [
        (r["loss"], r["grad_norm"]) for r in rows
    ]
    assert all(row["grad_norm"] > 0 for row in rows)
