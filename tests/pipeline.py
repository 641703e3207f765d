"""One tiny world, its tokenizers and tiny trained runs, made once a test session and shared by the pipeline tests.

Everything goes through the real command line and the demo's own recipes; only sizes are overridden.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmkit import cli
from mmkit.data.world import make_world
from mmkit.data.world.tokenizers import make_tokenizers

REPOSITORY = Path(__file__).resolve().parents[1]
GPT2 = (
    "llm.config={model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 4, n_positions: 96, "
    "initializer_range: 0.05, resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0}"
)
LLAMA = (
    "llm.config={model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 4, initializer_range: 0.05, max_position_embeddings: 512}"
)
# All that a number depends on is written here, so that the demo's recipes may be tuned without moving the golden losses.
TRAIN = ["train.batch_size=8", "train.steps=4", "train.warmup=0", "train.log_every=1", "train.lr=1e-3", "train.schedule=cosine"]
TRAIN += ["train.betas=[0.9,0.99]", "train.weight_decay=0.05", "train.clip_grad_norm=1.0", "train.precision=fp32", "seed=0"]
TRAIN += ["data.workers=0"]


@functools.cache
def root() -> Path:
    """The demo folder of the session: world, tokenizers, runs."""
    folder = Path(tempfile.mkdtemp(prefix="mmkit-pipeline-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_world(folder / "world", train=40, heldout=8)
    make_tokenizers(folder / "world")
    return folder


def superclass(run: Path, *more: str) -> list[str]:
    """Arguments of a tiny SuperClass run; labels of a small tokenizer, so that a step takes milliseconds."""
    tiny = [
        "encoder.image_size=32",
        "encoder.patch_size=8",
        "encoder.layout=superclass",
        "data.crop_scale=[1.0,1.0]",
        "data.idf=online",
        "encoder.model_args={embed_dim: 32, depth: 2, num_heads: 2, weight_init: ''}",
        f"data.labels={root()}/world/tokenizers/bpe",
        "data.val=null",
        "train.val_every=null",
    ]
    return ["train", "demo-superclass", f"run={run}", *tiny, *TRAIN, *more]


def clipcap(run: Path, *more: str) -> list[str]:
    """Arguments of a tiny ClipCap run on the shared encoder."""
    tiny = [f"encoder={trained('superclass')}", GPT2, "data.val=null", "train.val_every=null", "tune_llm=true", "max_length=48"]
    tiny.append("mapper={kind: mlp, prefix_length: 4, feature_norm: standardize}")
    return ["train", "demo-clipcap", f"run={run}", *tiny, *TRAIN, *more]


def align(run: Path, *more: str) -> list[str]:
    """Arguments of a tiny LLaVA alignment on the shared encoder."""
    tiny = [f"encoder={trained('superclass')}", LLAMA, "max_length=256", "feature_layer=-2"]
    return ["train", "demo-llava-align", f"run={run}", *tiny, *TRAIN, *more]


def finetune(run: Path, *more: str) -> list[str]:
    """Arguments of a tiny LLaVA fine-tuning that goes on from the shared alignment."""
    return ["train", "demo-llava-finetune", f"run={run}", f"model={trained('align')}", "max_length=384", *TRAIN, *more]


def lora(run: Path, *more: str) -> list[str]:
    """Arguments of a tiny LoRA tuning."""
    return finetune(run, "tune=lora", "lora.r=4", "lora.alpha=8", "projector_lr=2e-3", *more)


STAGES = {"superclass": superclass, "clipcap": clipcap, "align": align, "finetune": finetune, "lora": lora}


@functools.cache
def trained(stage: str) -> Path:
    """A finished tiny run of a stage, four steps, made on first use; treat it as read-only."""
    folder = root() / "runs" / stage
    assert mmkit(*STAGES[stage](folder)) == 0
    return folder


def mmkit(*arguments: str) -> int:
    """Run the command line in this process; returns the exit code."""
    os.environ["MMKIT_DEMO"] = str(root())
    # A fixed number of threads: sums in another order would move the golden values.
    torch.set_num_threads(1)
    with pytest.raises(SystemExit) as left:
        cli.main(list(map(str, arguments)))
    return int(left.value.code or 0)


def environment(**more: str) -> dict[str, str]:
    """Environment of a child process: the shared world, one thread, no launcher of an outer process."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    path = os.pathsep.join(filter(None, [str(REPOSITORY), kept.get("PYTHONPATH")]))
    binaries = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    # No GPU: every process computes on the CPU and talks by gloo, wherever the tests run.
    fixed = {"MMKIT_DEMO": str(root()), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, "PATH": binaries}
    return {**kept, **fixed, **more}


def python(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a Python process with the shared world; never raises for its exit code."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment(**more), cwd=root(), capture_output=True, text=True, timeout=300, check=False)


def torchrun(*arguments: str, processes: int = 2, **more: str) -> subprocess.CompletedProcess[str]:
    """The command line on several processes with DDP over gloo; ``more`` goes into their environment."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", "mmkit"]
    return python(*launch, *arguments, **more)


def pictures() -> list[Path]:
    """The held-out pictures' files."""
    return sorted((root() / "world" / "images" / "heldout").glob("*.jpg"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's product, by file and name."""
    files = sorted((run / "model").rglob("*.safetensors"))
    assert files, f"no weights in {run}"
    return {f"{f.relative_to(run)}:{k}": v for f in files for k, v in load_file(f).items()}


def largest_difference(first: Path, second: Path) -> float:
    """Largest absolute difference between two runs' weights; the tensors must be the same ones."""
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    return max(float((one[k].double() - two[k].double()).abs().max()) for k in one)


def rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, none if it is absent."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def losses(run: Path) -> list[float]:
    """Training losses in order of the steps."""
    return [row["loss"] for row in rows(run / "metrics.jsonl") if "loss" in row]


def manifest(run: Path) -> dict[str, Any]:
    """A run's manifest."""
    found: dict[str, Any] = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    return found
