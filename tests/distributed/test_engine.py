"""One process equals two: DDP over gloo on the CPU, every case a real `torchrun`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pipeline
import pytest
import torch
from safetensors.torch import load_file

from mmkit.data.batching import EvenBatches, Share
from mmkit.data.layout import Layout
from mmkit.data.order import make_order
from mmkit.distributed.engine import Engine, _changing_state
from mmkit.errors import InputError

# Signals rank 1 alone in the middle of step 2, wherever the process is started.
STOP_RANK_1 = """
import os, signal, sys
from mmkit import cli
from mmkit.training import loop
scale = loop.lr_scale
def stopping(step, **more):
    if step == 1 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return scale(step, **more)
loop.lr_scale = stopping
cli.main(sys.argv[1:])
"""


def engine(**more) -> Engine:
    return Engine(**{"precision": "fp32", "deepspeed": None, "batch_size": 8, "micro_batch_size": None, "clip": None, **more})


def conversations() -> Path:
    """The demo's conversations with as many text-only ones: some micro-batches have no picture at all."""
    path = pipeline.root() / "world" / "half_text.json"
    if not path.exists():
        items = [i for i in json.loads((path.parent / "llava_train.json").read_text()) if "image" in i]
        turns = [{"from": "human", "value": "How many colours are there?"}, {"from": "gpt", "value": "seven"}]
        answers = [{**turns[1], "value": "seven " * (n % 5 + 1)} for n in range(len(items))]
        text = [{"id": f"only-{n}", "conversations": [turns[0], answer]} for n, answer in enumerate(answers)]
        path.write_text(json.dumps(items + text))
    return path


def test_accumulation_follows_from_the_global_batch():
    made = engine(micro_batch_size=2)
    assert (made.accumulation, made.rank, made.world_size, made.is_main) == (4, 0, 1, True)
    made.close()
    made = engine()
    assert (made.micro_batch_size, made.accumulation) == (8, 1)
    made.close()


def test_a_batch_that_cannot_be_split_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="global batch 8 is no multiple of micro-batch 2 x world size 3"):
        engine(micro_batch_size=2)


def test_clipping_and_norm():
    made = engine(clip=1.0)
    # Drawn anew, a weight could come out of the update so near to 0 that no relative bound holds.
    torch.manual_seed(0)
    module = torch.nn.Linear(2, 1, bias=False)
    made.prepare(module, torch.optim.SGD([{"params": module.parameters(), "base_lr": 2.0}], lr=0.0, fused=True))
    module.weight.grad = torch.tensor([[3.0, 4.0]])
    before = module.weight.detach().clone()
    assert float(made.gradient_norm()) == pytest.approx(5.0)
    made.update(0.25, broken=torch.tensor(False))
    assert torch.allclose(module.weight, before - 2.0 * 0.25 * torch.tensor([[0.6, 0.8]]))
    assert module.weight.grad is None
    made.close()


def test_changing_state_leaves_frozen_parts_out_and_keeps_buffers():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    module[0].weight.requires_grad_(False)
    assert set(_changing_state(module)) == {
        "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"
    }  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_superclass_as_one(tmp_path):
    world = pipeline.root() / "world"
    # Nine validation pictures on two ranks with micro-batches of two: one rank has a batch less.
    # Adam's usual eps would turn rounding in gradients near zero into steps of the learning rate's size.
    common = ["train.steps=3", "train.micro_batch_size=2", "train.checkpoint_every=2", "train.val_every=3", "data.limit=30"]
    common.append("train.eps=1e-3")
    common += [f"data.val={world / 'captions_heldout.json'}", f"data.val_image_root={world / 'images' / 'heldout'}"]
    assert pipeline.mmkit(*pipeline.superclass(tmp_path / "one", *common)) == 0
    done = pipeline.torchrun(*pipeline.superclass(tmp_path / "two", *common))
    assert done.returncode == 0, done.stderr
    assert pipeline.largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5
    states = [load_file(tmp_path / n / "checkpoints" / "step-00000002" / "model.safetensors") for n in ("one", "two")]
    assert states[0]["idf.n"].tolist() == states[1]["idf.n"].tolist() == [16]
    assert torch.equal(states[0]["idf.df"], states[1]["idf.df"]) and int(states[0]["idf.df"].sum()) > 16
    one, two = (pipeline.rows(tmp_path / n / "metrics.jsonl") for n in ("one", "two"))
    assert [r["loss"] for r in two if "loss" in r] == pytest.approx([r["loss"] for r in one if "loss" in r], abs=1e-6)
    assert two[-1] == pytest.approx(one[-1], abs=1e-4) and "val_recall@10" in two[-1]
    assert pipeline.manifest(tmp_path / "two")["world_size"] == 2
    assert done.stdout.count("done:") == 1, "only the main process speaks"


@pytest.mark.slow
def test_two_processes_train_llava_as_one_with_text_only_batches(tmp_path):
    data = conversations()
    common = [f"data.train={data}", "train.steps=3", "train.micro_batch_size=1"]
    order = make_order(Layout.flat(80), 0)
    shares = [EvenBatches(order, batch_size=8, micro_batch_size=1, share=Share(rank, 2)).stream(0, 3) for rank in (0, 1)]
    pairs = [[share[0].index >= 40 for share in both] for both in zip(*shares, strict=True)]
    assert [True, False] in pairs or [False, True] in pairs, "one rank has a picture while the other has none"
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "one", *common)) == 0
    done = pipeline.torchrun(*pipeline.finetune(tmp_path / "two", *common))
    assert done.returncode == 0, done.stderr
    assert pipeline.largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5
    assert pipeline.losses(tmp_path / "two") == pytest.approx(pipeline.losses(tmp_path / "one"), abs=1e-4)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_another_world_size_goes_on(tmp_path):
    run = tmp_path / "run"
    arguments = pipeline.finetune(run, "train.steps=5", "train.micro_batch_size=2")
    script = tmp_path / "stop.py"
    script.write_text(STOP_RANK_1)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    stopped = pipeline.python(*launch, *arguments)
    assert stopped.returncode != 0 and "stopped by a signal after step 3 of 5" in stopped.stderr, stopped.stderr
    assert pipeline.manifest(run)["status"] == "stopped" and not (run / "model").exists()
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000003"]
    # The same global batches for every number of processes: one goes on where two stopped.
    assert pipeline.mmkit(*arguments) == 0
    assert [r["step"] for r in pipeline.rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    shutil.move(run, tmp_path / "stopped")
    assert pipeline.mmkit(*arguments) == 0
    assert pipeline.largest_difference(run, tmp_path / "stopped") < 1e-5


@pytest.mark.slow
def test_one_process_of_eight_pieces_equals_eight_processes(tmp_path):
    common = ["train.steps=2", "train.micro_batch_size=1", "train.eps=1e-3", "encoder.patch_drop=0.5", "track.kind=none"]
    assert pipeline.mmkit(*pipeline.superclass(tmp_path / "1x8", *common)) == 0
    done = pipeline.torchrun(*pipeline.superclass(tmp_path / "8x1", *common), processes=8)
    assert done.returncode == 0, done.stderr
    assert pipeline.losses(tmp_path / "8x1") == pytest.approx(pipeline.losses(tmp_path / "1x8"), abs=1e-6)
    tables = [load_file(tmp_path / name / "model" / "idf.safetensors") for name in ("1x8", "8x1")]
    assert torch.equal(tables[0]["df"], tables[1]["df"]) and tables[0]["n"].tolist() == tables[1]["n"].tolist() == [16]
    assert pipeline.largest_difference(tmp_path / "1x8", tmp_path / "8x1") < 1e-6
