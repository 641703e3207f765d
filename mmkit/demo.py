"""``mmkit demo``: the whole way on the built-in demo world, with the same recipes and functions as the real thing.

Every step is a run directory or a folder that is complete or absent, so the demo can be interrupted and started again.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import mmkit
from mmkit.commands import run_train
from mmkit.config import EvalRecipe, ProbeRecipe, load_recipe
from mmkit.data.world import make_world
from mmkit.data.world.tokenizers import make_tokenizers
from mmkit.files import hash_text, write_text
from mmkit.recipes import find_recipe, list_recipes
from mmkit.run import Run

logger = logging.getLogger(__name__)

# Row label in the report -> folder of its runs. The first one is the reference of the paired differences.
SYSTEMS = {"SuperClass": "superclass", "random frozen": "random"}
RIVALS = {"CLIP": "clip"}
# The one line that makes the baseline of the recipe: same pictures, captions, order, steps and optimiser. The demo's captions are
# short, and a text tower with empty places would only cost time.
CLIP = ("stage=clip", "text.context_length=40")
NO_VALIDATION = ("data.val=null", "train.val_every=null")
BLIND = "blind (pictures shuffled)"


def run_demo(out: Path, *, clip: bool = False, restart: bool = False) -> Path:
    """Make the world, train every stage for two encoders, evaluate them and the blind baseline, write the report.

    Args:
        out: Folder for everything.
        clip: Also train CLIP on the same samples and take it the whole way.
        restart: Train and evaluate anew (the world is kept).

    Returns:
        Path of report.html.
    """
    began = time.monotonic()
    report = out / "report" / "report.html"
    systems = {**SYSTEMS, **RIVALS} if clip else SYSTEMS
    stamp = _stamp(systems)
    # The stamp is written last: a report without it is half a demo, or an older version's.
    if report.is_file() and not restart and (out / "demo.txt").is_file() and (out / "demo.txt").read_text() == stamp:
        return report
    # The demo recipes take every path below this folder; the same recipes run from the shell.
    os.environ["MMKIT_DEMO"] = str(out)
    # Tiny models load in a blink; a bar for each would bury the demo's own lines.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # With its default sizes and seed: every demo, on every machine, sees the same pictures.
    counts = make_world(out / "world")
    logger.info("world: %s", "  ".join(f"{k} {v}" for k, v in counts.items()))
    make_tokenizers(out / "world")
    runs: list[Path] = []

    def stage(recipe: str, *overrides: str) -> Path:
        """Train one stage."""
        return run_train(load_recipe(find_recipe(recipe), overrides), restart=restart).path

    def measure(recipe: str, *overrides: str) -> Path:
        """Probe or evaluate; the run enters the report."""
        run = _measure(recipe, list(overrides), restart)
        runs.append(run.path)
        return run.path

    stage("demo-superclass")
    # No step of training: the same architecture with its initial weights is the random encoder.
    stage("demo-superclass", f"run={out}/random/encoder", "train.steps=0", "system=random frozen", *NO_VALIDATION)
    if clip:
        stage("demo-superclass", *CLIP, f"run={out}/clip/encoder", "system=CLIP")
    for label, folder in systems.items():
        base = out / folder
        named = f"system={label}"
        measure("demo-probe", f"run={base}/probe", f"encoder={base}/encoder", named)
        stage("demo-clipcap", f"run={base}/clipcap", f"encoder={base}/encoder", named)
        stage("demo-llava-align", f"run={base}/llava-align", f"encoder={base}/encoder", named)
        # From the aligned model, not from encoder and LLM: the second stage goes on with the first one's projector.
        stage("demo-llava-finetune", f"run={base}/llava-finetune", f"model={base}/llava-align", named)
        measure("demo-eval-captioner", f"run={base}/eval-captioner", f"model={base}/clipcap", named)
        measure("demo-eval-mllm", f"run={base}/eval-mllm", f"model={base}/llava-finetune", named)
        # What the second stage adds: after the first alone the model captions whatever it is asked.
        measure("demo-eval-mllm", f"run={base}/eval-align", f"model={base}/llava-align", f"{named}, align only")
    # The blind rows are SuperClass's own models with other pictures: what is left is what language alone can do.
    seeing = out / SYSTEMS["SuperClass"]
    for recipe, name, model in (("captioner", "eval-captioner", "clipcap"), ("mllm", "eval-mllm", "llava-finetune")):
        run = f"run={out}/blind/{name}"
        measure(f"demo-eval-{recipe}", run, f"model={seeing}/{model}", f"system={BLIND}", "blind=true")

    # Only now: the report's drawing and template libraries are no matter of the stages.
    from mmkit.eval.report import build_report

    path = build_report(runs, out / "report", title="mmkit demo")
    write_text(out / "demo.txt", stamp)
    logger.info("the whole demo took %.0f s", time.monotonic() - began)
    return path


def _stamp(systems: dict[str, str]) -> str:
    """What the report depends on: this version, its rows, the demo's recipes. After a change the runs are looked at again."""
    recipes = [path for name, path in list_recipes().items() if name.startswith("demo-")]
    return hash_text(mmkit.__version__, *systems, *(path.read_text(encoding="utf-8") for path in recipes)) + "\n"


def _measure(recipe: str, overrides: list[str], restart: bool) -> Run:
    """A probe or an evaluation."""
    from mmkit.encoders.probing import run_probe
    from mmkit.eval.run import run_eval

    loaded = load_recipe(find_recipe(recipe), overrides)
    if isinstance(loaded, ProbeRecipe):
        return run_probe(loaded, restart=restart)
    assert isinstance(loaded, EvalRecipe)
    return run_eval(loaded, restart=restart)
