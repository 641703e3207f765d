"""The loop of an evaluation on a tiny MLLM and a tiny captioner: whatever the batches, the answers are those of `predict`."""

from __future__ import annotations

import functools
import io
import random
from pathlib import Path

import numpy as np
import pipeline
import pytest
import torch
from PIL import Image
from transformers import GPT2Config, LlamaConfig

import mmkit
from mmkit.config import DecodingConfig, EvalRecipe, TaskConfig
from mmkit.distributed.preemption import Preemption
from mmkit.distributed.ranks import Ranks
from mmkit.errors import InputError, StoppedError
from mmkit.eval.batches import Batches
from mmkit.eval.examples import Example, Picture
from mmkit.eval.generation import Generator, check_length
from mmkit.eval.parts import Answers, read_parts
from mmkit.eval.pictures import FeatureStore
from mmkit.eval.reuse import AnswerCache
from mmkit.eval.schedule import Planned
from mmkit.models.answering import Prompt
from mmkit.models.inference import load_model
from mmkit.run import Run

MLLM = "finetune"
QUESTIONS = ["What?", "How many red circles are there in this picture?", "Is it blue?", "Read the word, please."]


@functools.cache
def model(stage: str):
    return load_model(str(pipeline.trained(stage)), torch.device("cpu"))


def png(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@functools.cache
def examples() -> list[Example]:
    """Several questions on pictures in files and in a table, two pictures in one question, text alone; not in order."""
    files = [Picture(str(path)) for path in pipeline.pictures()[:3]]
    tables = [Picture(f"image_{i}", png(i)) for i in range(2)]
    shown = [(picture,) for picture in [*files, *tables]]
    asked = [(one, question) for one in shown for question in QUESTIONS]
    asked += [((files[0], tables[0]), "Compare <image> with <image>."), ((files[0], tables[0]), "Which is blue?"), ((), "Hello?")]
    random.Random(0).shuffle(asked)
    return [Example(i, images, prompt, prompt, []) for i, (images, prompt) in enumerate(asked)]


@functools.cache
def expected(how: str = "") -> dict[int, str]:
    """One question at a time, by the Python API."""
    decoding = HOW[how]
    found = {}
    for e in examples():
        pictures = [Image.open(io.BytesIO(p.read())).convert("RGB") for p in e.images]
        found[e.id] = model(MLLM).predict([pictures], [e.prompt], max_new_tokens=6, **decoding)[0]
    return found


HOW = {"": {}, "beam": {"num_beams": 2}, "sample": {"decoding": "sample", "temperature": 1.3, "seed": 5}}


def task(**generation) -> TaskConfig:
    return TaskConfig(task="vqav2", generation={"max_new_tokens": 6, "reuse": False, **generation})


def answered(run: Path, config: TaskConfig, some: list[Example] | None = None, *, stage: str = MLLM, **more) -> Answers:
    known = more.pop("known", Answers())
    recipe = EvalRecipe(stage="eval", run=str(run), model="m", tasks=(config,), **more)
    run.mkdir(exist_ok=True)
    cache = functools.partial(AnswerCache, "m", "cpu", folder=run.parent / "cache")
    generator = Generator(lambda: model(stage), recipe, Run(run), Ranks(Preemption()), cache)
    generator.answer("vqa", config, some if some is not None else examples(), known)
    generator.close()
    return read_parts(run)["vqa"]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 64, "auto"])
def test_every_batch_size_gives_the_same_answers(tmp_path, size):
    found = answered(tmp_path / "run", task(batch_size=size))
    assert found.texts == expected() and len(set(found.texts.values())) > 5
    assert found.speed()["batch_size_used"] == (64 if size == "auto" else size)
    assert found.speed()["pictures_encoded"] == 5, "each picture once"


def test_a_template_that_ends_with_the_picture(tmp_path):
    """After alignment alone a model describes whatever it is shown; the question is no part of its prompt."""
    some = [e for e in examples() if len(e.images) == 1]
    assert {model("align").prompt(e.prompt, 1).beginning for e in some} == {()}
    found = answered(tmp_path / "run", task(batch_size=5), some, stage="align")
    pictures = [Image.open(io.BytesIO(e.images[0].read())).convert("RGB") for e in some]
    one_by_one = [model("align").predict([p], ["What?"], max_new_tokens=6)[0] for p in pictures]
    assert [found.texts[e.id] for e in some] == one_by_one
    # The same through the Python API, where a picture has several questions.
    assert model("align").predict([pictures[0]] * 3, QUESTIONS[:3], max_new_tokens=6) == one_by_one[:1] * 3


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_an_answer_is_cut_where_it_has_no_end(tmp_path, monkeypatch, cache):
    """A token that some answers contain is made their end; the others end by their length."""
    mllm = model(MLLM)
    whole = {}
    for e in examples():
        pictures = [Image.open(io.BytesIO(p.read())).convert("RGB") for p in e.images]
        whole[e.id] = mllm._answers([pictures], [e.prompt], {"max_new_tokens": 6})[0]
    end = whole[examples()[0].id][2]
    monkeypatch.setattr(mllm.writer, "stop", [end])
    found = answered(tmp_path / "run", task(batch_size=5, cache=cache))
    assert found.cut == {i for i, ids in whole.items() if end not in ids}
    assert 0 < len(found.cut) < len(examples())


@pytest.mark.parametrize("seed", range(3))
def test_every_order_gives_the_same_answers(tmp_path, seed):
    some = examples().copy()
    random.Random(seed).shuffle(some)
    assert answered(tmp_path / "run", task(batch_size=5), some).texts == expected()


@pytest.mark.parametrize(
    ("how", "more"),
    [("", {"cache": "static"}), ("beam", {}), ("beam", {"cache": "static"}), ("sample", {}), ("sample", {"cache": "static"})],
)
def test_other_ways_and_caches_give_the_answers_of_predict(tmp_path, how, more):
    found = answered(tmp_path / "run", task(batch_size=7, **HOW[how], **more))
    assert found.texts == expected(how)


def test_a_picture_whose_features_have_gone_is_encoded_again(tmp_path, monkeypatch):
    monkeypatch.setattr("mmkit.eval.generation.FeatureStore", functools.partial(FeatureStore, 0))
    found = answered(tmp_path / "run", task(batch_size=3))
    assert found.texts == expected() and found.speed()["pictures_encoded"] > 5


class Cramped:
    """A model with room for so many rows at a time."""

    def __init__(self, rooms: int, error: Exception) -> None:
        self.rooms, self.error, self.tried = rooms, error, []

    def __call__(self, write):
        def crowded(rows, *args, **kwargs):
            self.tried.append(len(rows))
            if len(rows) > self.rooms:
                raise self.error
            return write(rows, *args, **kwargs)

        return crowded


OUT = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")]


@pytest.mark.parametrize("error", OUT, ids=["gpu", "cpu"])
@pytest.mark.parametrize("rooms", [1, 3, 7])
def test_batches_are_halved_where_memory_runs_out_and_stay_so(tmp_path, monkeypatch, caplog, rooms, error):
    cramped = Cramped(rooms, error)
    monkeypatch.setattr(model(MLLM).writer, "write", cramped(model(MLLM).writer.write))
    found = answered(tmp_path / "run", task(batch_size="auto"))
    assert found.texts == expected()
    assert found.speed()["batch_size_used"] <= rooms
    halved = [record.getMessage() for record in caplog.records if "out of memory with" in record.getMessage()]
    assert halved and "going on with" in halved[0]
    # Once it is known what fits, nothing larger is tried again.
    first = next(i for i, size in enumerate(cramped.tried) if size <= rooms)
    assert max(cramped.tried[first:]) <= rooms and cramped.tried[:first] == sorted(set(cramped.tried[:first]), reverse=True)


def test_memory_that_runs_out_in_the_tower_halves_too(tmp_path, monkeypatch):
    features = type(model(MLLM)).features

    def crowded(self, squares):
        if len(squares) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return features(self, squares)

    monkeypatch.setattr(type(model(MLLM)), "features", crowded)
    assert answered(tmp_path / "run", task(batch_size=64)).texts == expected()


def test_one_question_that_is_too_much_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(model(MLLM).writer, "write", Cramped(0, OUT[0])(model(MLLM).writer.write))
    with pytest.raises(InputError, match=r"question \d+ alone does not fit in memory; use fewer max_new_tokens"):
        answered(tmp_path / "run", task(batch_size=4))


def test_other_errors_are_no_lack_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(model(MLLM).writer, "write", Cramped(0, RuntimeError("shapes do not match"))(model(MLLM).writer.write))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        answered(tmp_path / "run", task(batch_size=4))


def count_questions(monkeypatch: pytest.MonkeyPatch, asked: list[int]) -> None:
    """Note the size of each batch that reaches the model."""
    write = model(MLLM).writer.write
    monkeypatch.setattr(model(MLLM).writer, "write", lambda rows, *a, **k: asked.append(len(rows)) or write(rows, *a, **k))


def test_answers_are_on_disk_batch_by_batch_and_not_asked_for_again(tmp_path, monkeypatch):
    answer = Batches.answer

    def breaks(self, batch, *, following):
        if len(read_parts(tmp_path / "run")["vqa"].texts) >= 10:
            raise KeyboardInterrupt
        return answer(self, batch, following=following)

    monkeypatch.setattr(Batches, "answer", breaks)
    with pytest.raises(KeyboardInterrupt):
        answered(tmp_path / "run", task(batch_size=4))
    known = read_parts(tmp_path / "run")["vqa"]
    assert 10 <= len(known.texts) < 14
    monkeypatch.setattr(Batches, "answer", answer)
    asked: list[int] = []
    monkeypatch.setattr(
        Batches, "answer", lambda self, b, *, following: asked.append(len(b)) or answer(self, b, following=following)
    )
    found = answered(tmp_path / "run", task(batch_size=4), known=known)
    assert sum(asked) == len(examples()) - len(known.texts) and found.texts == expected()
    # Nothing left: the model is not even opened.
    monkeypatch.setattr("test_generation.model", lambda stage: pytest.fail("opened"))
    answered(tmp_path / "run", task(batch_size=4), known=found)


def test_unreadable_pictures_get_empty_answers_and_are_listed(tmp_path):
    bad = Picture(str(tmp_path / "absent.jpg"))
    some = [*examples()[:6], Example(100, (bad,), "What?", "", []), Example(101, (bad,), "Who?", "", [])]
    found = answered(tmp_path / "run", task(batch_size=3), some, max_skipped=0.5)
    assert found.texts == {**{e.id: expected()[e.id] for e in some[:6]}, 100: "", 101: ""}
    assert {(row.source, row.key) for row in found.left_out} == {(bad.name, "100"), (bad.name, "101")}
    assert {row["key"] for row in pipeline.rows(tmp_path / "run" / "skipped.jsonl")} == {"100", "101"}
    with pytest.raises(InputError, match="2 of 8 pictures cannot be used, over the limit of 10"):
        answered(tmp_path / "strict", task(batch_size=3), some, max_skipped=0.1)


def test_answers_of_an_earlier_run_are_taken_over(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "mmkit")
    first = answered(tmp_path / "one", task(reuse=True), examples()[:-5])
    assert not first.from_cache
    asked: list[int] = []
    answer = Batches.answer
    monkeypatch.setattr(
        Batches, "answer", lambda self, b, *, following: asked.append(len(b)) or answer(self, b, following=following)
    )
    # Only what is new: other ids and another order are no new questions.
    moved = [Example(1000 + e.id, e.images, e.prompt, e.question, []) for e in reversed(examples())]
    second = answered(tmp_path / "two", task(reuse=True, batch_size=3), moved)
    assert sum(asked) == 5 and len(second.from_cache) == len(examples()) - 5
    assert second.texts == {1000 + i: text for i, text in expected().items()}
    assert "answers taken from earlier runs (generation.reuse)" in caplog.text
    # Asked otherwise, or told not to look: answered anew.
    for config in (task(reuse=True, num_beams=2), task(reuse=False)):
        asked.clear()
        assert not answered(tmp_path / f"other-{config.generation.num_beams}", config).from_cache and sum(asked) == len(
            examples()
        )


def test_a_changed_picture_is_another_picture(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(png(1))
    some = [Example(0, (Picture(str(file)),), "What?", "", [])]
    answered(tmp_path / "one", task(reuse=True), some)
    assert answered(tmp_path / "two", task(reuse=True), some).from_cache == {0}
    file.write_bytes(png(2))
    assert not answered(tmp_path / "three", task(reuse=True), some).from_cache
    file.unlink()
    assert not answered(tmp_path / "four", task(reuse=True), some, max_skipped=1.0).from_cache


def test_questions_that_are_too_long_are_refused_before_any_is_asked(tmp_path, caplog):
    """GPT-2 has no position beyond its last, on a GPU such an index ends the process; rotary positions go on, and get worse."""
    rows = [Planned(e, Prompt((1,) * 20, (2,) * length), (), None) for e, length in zip(examples(), (3, 9, 5), strict=False)]
    check_length("vqa", rows, 3, GPT2Config(n_positions=32))
    longest = f"question {rows[1].example.id} and its answer may take 33 tokens, the language model is made for 32"
    with pytest.raises(InputError, match=f"vqa: {longest}; lower generation.max_new_tokens"):
        check_length("vqa", rows, 4, GPT2Config(n_positions=32))
    assert not caplog.records
    check_length("vqa", rows, 4, LlamaConfig(max_position_embeddings=32))
    assert [record.getMessage() for record in caplog.records] == [f"vqa: {longest}"]
    # The loop asks this of its own model, which has room for 512.
    with caplog.at_level("WARNING", "mmkit"):
        answered(tmp_path / "run", task(max_new_tokens=500), examples()[:1])
    assert any("the language model is made for 512" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("limit", [{"max_pixels": 100}, {"max_bytes": 100}])
def test_a_picture_over_the_limit_is_left_out_whatever_earlier_runs_answered(tmp_path, limit):
    some = [Example(0, (Picture("a", png(1)),), "What?", "", [])]
    assert answered(tmp_path / "one", task(reuse=True), some).texts[0]
    found = answered(tmp_path / "two", task(reuse=True), some, max_skipped=1.0, **limit)
    assert found.texts == {0: ""} and len(found.left_out) == 1 and not found.from_cache


def test_a_signal_is_heard_while_known_pictures_are_looked_up(tmp_path, monkeypatch):
    monkeypatch.setattr("mmkit.eval.generation._AT_ONCE", 2)
    answered(tmp_path / "one", task(reuse=True))
    looks: list[int] = []

    def told(self):
        looks.append(1)
        if len(looks) == 2:
            raise StoppedError("stopped by SIGTERM")

    monkeypatch.setattr(Ranks, "look", told)
    with pytest.raises(StoppedError):
        answered(tmp_path / "two", task(reuse=True))
    assert not read_parts(tmp_path / "two")["vqa"].texts


@pytest.mark.parametrize("size", [1, 3, "auto"])
@pytest.mark.parametrize("how", ["", "sample", "paper"])
def test_captions_are_those_of_predict(tmp_path, how, size):
    decoding = {**HOW, "paper": {"decoding": "paper"}}[how]
    some = [Example(i, (Picture(str(path)),), "", None, []) for i, path in enumerate(pipeline.pictures())]
    config = TaskConfig(task="coco-caption", generation={"max_new_tokens": 9, "batch_size": size, "reuse": False, **decoding})
    found = answered(tmp_path / "run", config, some, stage="clipcap")
    pictures = [Image.open(path) for path in pipeline.pictures()]
    way = decoding or {"decoding": "search"}
    assert list(found.texts.values()) == mmkit.load(pipeline.trained("clipcap")).predict(pictures, max_new_tokens=9, **way)


def test_the_settings_of_an_answer_are_those_of_decoding_alone():
    generation = task(batch_size=3, cache="static", num_beams=2).generation
    assert DecodingConfig(**generation.decoding_alone()) == DecodingConfig(max_new_tokens=6, num_beams=2)
