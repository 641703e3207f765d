"""The loop that shares beginnings against transformers' ``generate``, one question at a time."""

from __future__ import annotations

import functools
import itertools
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.cache_utils import DynamicLayer

from mmkit.config import DecodingConfig
from mmkit.errors import InputError
from mmkit.models.answering import RoomyLayer
from mmkit.models.decoding import search_arguments
from mmkit.models.inference import Mllm, load_model
from mmkit.models.llava import build_llava, save_mllm
from mmkit.models.llm import build_llm
from mmkit.models.processor import processor_for

from .tiny import GPT2, LLAMA, siglip, tokenizer

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
SAMPLE = {"decoding": "sample", "temperature": 1.1, "top_k": 50, "top_p": 0.95, "seed": 3}
# Wide weights: at the usual 0.02 a random model writes one token over and over, whatever it is shown.
WIDE = {"initializer_range": 0.5}
NEO = {
    "model_type": "gpt_neo",
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 16,
    "max_position_embeddings": 256,
    "resid_dropout": 0.0,
    "embed_dropout": 0.0,
    "attention_dropout": 0.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32}
LONG |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LLMS = {
    "llama": {**LLAMA, **WIDE},
    "gpt2": {**GPT2, **WIDE, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "qwen3": {**LLAMA, **WIDE, "model_type": "qwen3", "head_dim": 8},
    # Its window is shorter than a prompt with its answer: places in the cache count there, padding too.
    "mistral": {**LLAMA, **WIDE, "model_type": "mistral", "sliding_window": 30, "head_dim": 8},
    # Its window is in the masks and not in the cache.
    "gpt_neo": {**NEO, **WIDE},
    # Slopes over the distance in places of the cache; it is told no positions.
    "mpt": {"model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 256, **WIDE},
    # Beyond 32 tokens these turn by the length of the longest row.
    "dynamic": {**LLAMA, **WIDE, "max_position_embeddings": 32, "rope_parameters": DYNAMIC},
    "longrope": {**LLAMA, **WIDE, "rope_parameters": LONG},
}
QUESTIONS = ["what is this?", "how many red circles are near the table?", "two dogs?", "is the small bus blue?", "a", "three"]
TWO = "is <image> like <image>?"


@functools.cache
def opened(kind: str) -> Mllm:
    tok = tokenizer("sp", image=False)
    model = build_llava(siglip(), build_llm(None, config=LLMS[kind], seed=1, tokenizer=tok), tok)
    # Pictures that are seen: features as long as word embeddings.
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        torch.nn.init.normal_(layer.weight, std=0.5, generator=torch.Generator().manual_seed(2))
    meta = {"template": "demo", "image_fit": "squash", "image_size": 32, "num_image_tokens": 4, "mean": MEAN, "std": STD}
    folder = Path(tempfile.mkdtemp(prefix="mmkit-answering-"))
    save_mllm(model, processor_for(model, tok, mean=MEAN, std=STD, template="demo"), folder, meta=meta)
    return load_model(str(folder), torch.device("cpu"))


@functools.cache
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(3)]


def rows() -> list[tuple]:
    """Several questions a picture, two pictures in one question, and questions of text alone; shuffled."""
    found: list[tuple] = [([picture], question) for picture in pictures() for question in QUESTIONS]
    found += [(pictures()[:2], TWO), (pictures()[1::-1], TWO), (pictures()[:2], "is <image> small, <image> big?")]
    found += [([], question) for question in QUESTIONS[:3]]
    random.Random(0).shuffle(found)
    return found


@torch.no_grad()
def reference(mllm: Mllm, shown: list[Image.Image], question: str, how: DecodingConfig) -> list[int]:
    """transformers' generate on pixels, one question, no padding."""
    ids = torch.tensor([mllm.encode(question, len(shown))])
    squares = [mllm.square(picture) for picture in shown]
    seen = {"pixel_values": mllm.values(squares)} if shown else {}
    draws = [mllm.draw(how, question, squares)]
    # Dynamic rotary positions remember the longest row until they see a short one; this one comes first.
    mllm.model.model.language_model(input_ids=ids[:, -1:])
    arguments = search_arguments(how, stop=mllm.writer.stop, fill=mllm.writer.fill, draws=draws)
    out = mllm.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **seen, **arguments)
    return out[0, ids.shape[1] :].tolist()


@functools.cache
def references(kind: str, way: str) -> list[list[int]]:
    return [reference(opened(kind), shown, question, WAYS[way]) for shown, question in rows()]


WAYS = {
    "greedy": DecodingConfig(max_new_tokens=10),
    "sample": DecodingConfig(max_new_tokens=10, **SAMPLE),
    "beam": DecodingConfig(max_new_tokens=6, num_beams=3),
}


def answers(mllm: Mllm, some: list[tuple], how: DecodingConfig, *, share: bool = True, **more) -> list[list[int]]:
    asked = []
    for shown, question in some:
        squares = [mllm.square(picture) for picture in shown]
        features = mllm.features(squares) if squares else []
        draw = mllm.draw(how, question, squares)
        prompt = mllm.prompt(question, len(shown))
        asked.append(mllm.ask(prompt, features, key=(*map(id, shown), prompt.beginning) if share else None, draw=draw))
    return mllm.writer.write(asked, how, **more)


def test_the_models_of_these_tests_have_something_to_say():
    for kind in LLMS:
        found = references(kind, "greedy")
        distinct = {tuple(ids) for ids in found}
        assert len(distinct) > len(found) / 2, (kind, found)
    # Some rows end early and leave the batch.
    assert any(len(ids) < 10 for kind in LLMS for ids in references(kind, "sample"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LLMS)
def test_answers_are_those_of_one_by_one_generation(kind, way):
    mllm, how, expected = opened(kind), WAYS[way], references(kind, way)
    for share in (True, False):
        assert answers(mllm, rows(), how, share=share) == expected


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 24])
def test_every_batch_size_and_order_gives_the_same_answers(kind, size):
    mllm, how, expected = opened(kind), WAYS["greedy"], references(kind, "greedy")
    for seed, share in itertools.product(range(3), (True, False)):
        order = list(range(len(expected)))
        random.Random(seed).shuffle(order)
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), size):
            part = order[start : start + size]
            found |= dict(zip(part, answers(mllm, [rows()[i] for i in part], how, share=share), strict=True))
        assert [found[i] for i in range(len(expected))] == expected


@pytest.mark.parametrize("kind", LLMS)
def test_a_static_cache_changes_nothing(kind):
    if kind in ("gpt_neo", "mpt"):
        with pytest.raises(InputError, match="cannot be used with a static cache; use dynamic"):
            answers(opened(kind), rows(), WAYS["greedy"], cache="static")
        return
    assert answers(opened(kind), rows(), WAYS["greedy"], cache="static") == references(kind, "greedy")


def test_a_beginning_is_read_once_and_kept_as_long_as_it_is_asked_for(monkeypatch):
    mllm, how = opened("llama"), WAYS["greedy"]
    read: list[int] = []
    embedded = mllm.writer._embedded
    monkeypatch.setattr(
        mllm.writer, "_embedded", lambda ids, features: read.append(sum(map(len, ids))) or embedded(ids, features)
    )
    shown = [pictures()[0]]
    asked = [mllm.ask(mllm.prompt(q, 1), mllm.features([mllm.square(shown[0])]), key=(0,)) for q in QUESTIONS]
    mllm.writer.write(asked[:3], how, keep={asked[0].key})
    beginning = asked[0].shared
    assert read[0] == beginning, "one beginning for three questions"
    first = len(read)
    again = mllm.writer.write(asked[3:], how)
    assert len(read) == first + 1, "the beginning was kept"
    assert again == [reference(mllm, shown, q, how) for q in QUESTIONS[3:]]
    mllm.writer.write(asked[:1], how)
    assert read[-2:] == [beginning, len(asked[0].ids) - beginning], "and forgotten when nobody asked for it"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_an_interrupted_batch_leaves_nothing_behind(monkeypatch, error):
    """The Python API names pictures by identity, and after a Ctrl-C a new picture may lie where an old one lay."""
    mllm, how = opened("llama"), WAYS["greedy"]

    def asked(picture):
        features = mllm.features([mllm.square(picture)])
        return [mllm.ask(mllm.prompt(question, 1), features, key="the same place") for question in QUESTIONS[:2]]

    def interrupted(*arguments):
        raise error

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(mllm.writer, "_search", interrupted)
        mllm.writer.write(asked(pictures()[0]), how, keep={"the same place"})
    expected = [reference(mllm, [pictures()[1]], question, how) for question in QUESTIONS[:2]]
    assert mllm.writer.write(asked(pictures()[1]), how) == expected


def test_a_beginning_ends_with_its_last_keys_and_values(monkeypatch):
    """What the last layer makes of them, and the norm behind it, nobody reads."""
    mllm, calls = opened("llama"), []
    lm = mllm.model.model.language_model
    handles = [
        part.register_forward_hook(lambda module, args, out, n=name: calls.append(n))
        for name, part in (("first", lm.layers[0].mlp), ("last", lm.layers[-1].mlp), ("norm", lm.norm))
    ]
    asked = [mllm.ask(mllm.prompt(q, 1), mllm.features([mllm.square(pictures()[0])]), key=(0,)) for q in QUESTIONS[:2]]
    mllm.writer._read_beginnings(asked)
    for handle in handles:
        handle.remove()
    assert calls == ["first"]
    (beginning,) = mllm.writer._beginnings.values()
    assert [keys.shape[1] for keys, _ in beginning] == [asked[0].shared] * len(lm.layers)
    mllm.writer._beginnings = {}


def test_sampling_differs_by_seed_and_not_by_batch():
    mllm = opened("llama")
    other = DecodingConfig(max_new_tokens=10, **{**SAMPLE, "seed": 4})
    assert answers(mllm, rows(), other) != references("llama", "sample")


def test_answers_longer_than_the_room_that_was_made_for_them(monkeypatch):
    monkeypatch.setattr("mmkit.models.answering._ROOM", 1)
    for kind in ("llama", "gpt2"):
        assert answers(opened(kind), rows(), WAYS["greedy"]) == references(kind, "greedy")


def test_a_layer_with_room_holds_what_transformers_own_layer_holds():
    torch.manual_seed(0)
    pieces = [torch.randn(3, 2, length, 4) for length in (5, 1, 1, 9, 1)]
    ours, theirs = RoomyLayer(room=6), DynamicLayer()
    for piece in pieces:
        for found, expected in zip(ours.update(piece, -piece), theirs.update(piece, -piece), strict=True):
            assert torch.equal(found, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()
    keep = torch.tensor([2, 0])
    for layer in (ours, theirs):
        layer.batch_select_indices(keep)
    new = torch.randn(2, 2, 1, 4)
    assert torch.equal(ours.update(new, new)[1], theirs.update(new, new)[1])


def test_beginnings_lie_on_the_right_and_padding_is_no_nan():
    layer = RoomyLayer(room=5)
    torch.full((4, 5, 8, 8), float("nan"))  # memory that may come back uninitialised
    beginning = torch.ones(2, 3, 4)
    layer.begin([(beginning, 2 * beginning), None], width=4)
    assert layer.keys.shape == (2, 2, 4, 4)
    assert layer.keys[0, :, 0].eq(0).all() and layer.keys[0, :, 1:].eq(1).all() and layer.values[0, :, 1:].eq(2).all()
    assert layer.keys[1].eq(0).all() and layer.values[1].eq(0).all()
