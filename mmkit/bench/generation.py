"""``mmkit bench generation``: answers a second on questions of which several are about one picture.

The other side asks one question after the other, as LLaVA's own evaluation and every ``for`` loop around ``generate`` do: for
each the picture is read, goes through the tower and is read by the language model. Model, pictures, prompts, answers are equal.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, SiglipVisionConfig, SiglipVisionModel

from mmkit.bench.measure import interleaved
from mmkit.config import DecodingConfig, TaskConfig
from mmkit.data.images import decode_image
from mmkit.data.world import make_world
from mmkit.data.world.tokenizers import make_tokenizers
from mmkit.errors import InputError
from mmkit.eval.batches import Batches
from mmkit.eval.examples import Example, Id
from mmkit.eval.pictures import FeatureStore, Reader, picture_key
from mmkit.eval.schedule import next_batch, picture_order, plan
from mmkit.eval.tasks import load_task
from mmkit.models.decoding import search_arguments
from mmkit.models.llava import build_llava, num_image_tokens, save_mllm
from mmkit.models.llm import build_llm
from mmkit.models.mllm import Mllm
from mmkit.models.processor import processor_for

# SigLIP's, whose class the tower has.
_MEAN = _STD = [0.5, 0.5, 0.5]
_LIMITS = {"max_bytes": 1 << 26, "max_pixels": 100_000_000}


def run(
    *,
    pictures: int = 40,
    batch: int = 64,
    width: int = 128,
    layers: int = 3,
    image_size: int = 64,
    patch: int = 16,
    max_new_tokens: int = 8,
    repeats: int = 3,
    threads: int = 0,
) -> dict[str, Any]:
    """Answer the demo world's questions with a model of random weights, both ways.

    Args:
        pictures: About each there are five questions or so.
        batch: Questions that mmkit answers together.
        width: Hidden size of the Llama; the defaults are the demo's model.
        layers: Its blocks.
        image_size: Side of a picture.
        patch: Side of a patch; ``image_size=336 patch=14`` are LLaVA-1.5's 576 image tokens.
        max_new_tokens: Longest answer.
        repeats: Timed rounds, interleaved.
        threads: CPU threads; 0 leaves torch's choice.

    Returns:
        Conditions, answers a second of each side, what of mmkit's gain is due to what, and the ratio.

    Raises:
        InputError: A size that does not fit.
    """
    # A head has 32 numbers, as in the demo's model.
    if image_size % patch or width % 32:
        raise InputError("image_size is a multiple of patch, and width of 32", where="bench generation")
    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    how = DecodingConfig(max_new_tokens=max_new_tokens)
    with tempfile.TemporaryDirectory(prefix="mmkit-bench-") as folder:
        examples, mllm = _make(Path(folder), device, pictures, width, layers, image_size, patch)

        def ours() -> dict[Id, str]:
            return answer_in_batches(mllm, examples, how, batch)

        def plain() -> dict[Id, str]:
            return answer_in_batches(mllm, examples, how, batch, share=False)

        def loop() -> dict[Id, str]:
            return answer_one_by_one(mllm, examples, how)

        answers = loop()
        # Speed with other answers would be worth nothing.
        assert ours() == answers and plain() == answers, "answers differ from the loop's"
        contenders = {"mmkit": ours, "mmkit, nothing shared": plain, "one by one": loop}
        # Warm by now: the answers above were a round of each.
        seconds = interleaved(contenders, repeats=repeats, warmup=0)
    # Told too: of a model that says the same of every picture equal answers would prove nothing.
    count, distinct = len(examples), len(set(answers.values()))
    return {
        "conditions": f"{device.type}, {torch.get_num_threads()} threads, fp32, Llama of width {width} and {layers} layers, "
        f"{num_image_tokens(mllm.model.config)} image tokens, {batch} at a time, median of {repeats}",
        "questions": f"{count} about {pictures} pictures, at most {max_new_tokens} tokens, {distinct} different answers",
        "equal answers": f"{count} of {count}",
        **{f"{name}, answers/s": round(count / took, 1) for name, took in seconds.items()},
        "batches alone, mmkit / one by one": round(seconds["one by one"] / seconds["mmkit, nothing shared"], 1),
        "mmkit / one by one": round(seconds["one by one"] / seconds["mmkit"], 1),
    }


def _make(
    folder: Path, device: torch.device, pictures: int, width: int, layers: int, image_size: int, patch: int
) -> tuple[list[Example], Mllm]:
    """The world's questions, and a model that answers them at random."""
    world = folder / "world"
    # The training part is there for the tokenizers alone, which learn from its texts.
    make_world(world, train=60, heldout=pictures, image_size=image_size)
    make_tokenizers(world)
    task = TaskConfig(
        task="vqav2",
        annotations=str(world / "vqa_heldout_annotations.json"),
        questions=str(world / "vqa_heldout_questions.json"),
        image_root=str(world / "images" / "heldout"),
        prompt="{question}\nAnswer the question using a single word or phrase.",
    )
    torch.manual_seed(0)
    # The demo's tower. Without a pooling head, which LLaVA never asks.
    vision = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch,
        vision_use_head=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizers" / "sentencepiece")
    # Wide weights: at the usual 0.02 a random model answers everything with one token over and over.
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "initializer_range": 0.2}
    heads = {"num_attention_heads": width // 32, "num_key_value_heads": width // 32, "max_position_embeddings": 2048}
    llm = build_llm(None, config={"model_type": "llama", **sizes, **heads}, seed=0, tokenizer=tokenizer)
    model = build_llava(SiglipVisionModel(vision), llm, tokenizer)
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        # Pictures as loud as words, so that answers depend on them.
        nn.init.normal_(layer.weight, std=0.2)
    meta = {"template": "demo", "image_fit": "squash", "image_size": image_size, "mean": _MEAN, "std": _STD}
    meta["num_image_tokens"] = num_image_tokens(model.config)
    save_mllm(model, processor_for(model, tokenizer, mean=_MEAN, std=_STD, template="demo"), folder / "model", meta=meta)
    # From files, as an evaluation opens it.
    return load_task(task), Mllm(str(folder / "model"), device)


def answer_in_batches(
    mllm: Mllm, examples: list[Example], how: DecodingConfig, batch: int, *, share: bool = True
) -> dict[Id, str]:
    """As `mmkit eval` answers, without its files; with ``share=False`` every question is read whole."""
    prompts = [mllm.prompt(e.prompt, len(e.images)) for e in examples]
    pictures = [tuple(map(picture_key, e.images)) for e in examples]
    rows = plan(examples, prompts if share else [prompt.whole() for prompt in prompts], pictures)
    reader = Reader(picture_order(rows).items(), mllm.square, **_LIMITS)
    batches = Batches(mllm, FeatureStore(), reader, "dynamic", how, size=batch)
    found: dict[Id, str] = {}
    place = 0
    while place < len(rows):
        # Not `batch`: the size is halved where memory runs out.
        part = next_batch(rows, place, batches.size)
        place += len(part)
        found |= batches.answer(part, following=rows[place : place + 1])
    reader.close()
    return found


@torch.inference_mode()
def answer_one_by_one(mllm: Mllm, examples: list[Example], how: DecodingConfig) -> dict[Id, str]:
    """Transformers' ``generate`` on each question with its picture."""
    arguments = search_arguments(how, stop=mllm.writer.stop, fill=mllm.writer.fill)
    found: dict[Id, str] = {}
    for example in examples:
        ids = torch.tensor([mllm.encode(example.prompt, 1)], device=mllm.device)
        pixels = mllm.values([mllm.square(decode_image(example.images[0].read()))])
        out = mllm.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, **arguments)
        found[example.id] = mllm.texts(out[:, ids.shape[1] :].tolist())[0]
    return found
