"""The demo world: equal bytes, splits without a shared combination, official formats, balanced and true answers."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mmkit.data.world.write
from mmkit.data.images import decode_image
from mmkit.data.llava_json import read_llava
from mmkit.data.sources import SourceOptions, open_pairs
from mmkit.data.world import make_world
from mmkit.data.world.language import CAPTION_REQUESTS, captions
from mmkit.data.world.scene import COLORS, PLACES, SHAPES, WORDS, Scene, sample_split
from mmkit.errors import InputError
from mmkit.eval.scorers.formats import VqaQuestion, read_captions, read_textvqa, read_vqa
from mmkit.eval.scorers.textvqa import textvqa_accuracy
from mmkit.eval.scorers.vqa import rule_2021, vqa_accuracy

TINY = {"train": 40, "heldout": 24, "image_size": 48, "seed": 3}
LARGE = {"train": 3000, "heldout": 500, "image_size": 32, "seed": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "world"
    make_world(out, **TINY)
    return out


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Many questions, for statistics; one grey picture stands for all, as nobody looks at them."""
    out = tmp_path_factory.mktemp("large") / "world"
    grey = Image.new("RGB", (32, 32), (128, 128, 128))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmkit.data.world.write, "draw_scene", lambda scene, size, rng: grey)
        patch.setattr("mmkit.files.sync_folder", lambda folder: None)
        make_world(out, **LARGE)
    yield out


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def scenes(arguments: dict[str, int]) -> dict[int, Scene]:
    found = sample_split(arguments["seed"], train=arguments["train"], heldout=arguments["heldout"])
    return {number: scene for _, number, scene in found}


def test_equal_arguments_give_equal_bytes(world: Path, tmp_path: Path) -> None:
    counts = make_world(tmp_path / "again", **TINY)
    assert content(tmp_path / "again") == content(world)
    assert (counts["train_pictures"], counts["heldout_pictures"]) == (40, 24)
    assert counts["heldout_questions"] == 24 * 5
    assert counts == load(world / "world.json")["counts"]


def test_another_seed_gives_another_world(world: Path, tmp_path: Path) -> None:
    make_world(tmp_path / "other", **{**TINY, "seed": 4})
    one, two = content(world), content(tmp_path / "other")
    assert set(one) == set(two)
    assert sum(one[name] == two[name] for name in one) <= 1, "only the README is the same"


def test_a_larger_world_starts_with_the_smaller_one(world: Path, tmp_path: Path) -> None:
    make_world(tmp_path / "more", **{**TINY, "train": 50})
    for image in sorted((world / "images" / "train").iterdir()):
        assert image.read_bytes() == (tmp_path / "more" / "images" / "train" / image.name).read_bytes()


def test_equal_arguments_return_at_once(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*arguments: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(mmkit.data.world.write, "_make_picture", made)
    assert make_world(world, **TINY) == load(world / "world.json")["counts"]


def test_a_world_whose_ids_would_meet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--train: 900001 training pictures are too many; at most 900000"):
        make_world(tmp_path / "world", train=900_001)
    assert not (tmp_path / "world").exists()


def test_other_arguments_and_other_folders_are_refused(world: Path, tmp_path: Path) -> None:
    before = content(world)
    with pytest.raises(InputError, match=r"holds a world made with .*'train': 40.*choose another --out"):
        make_world(world, **{**TINY, "train": 41})
    assert content(world) == before
    (tmp_path / "letter.txt").write_text("x")
    for out in (tmp_path, tmp_path / "letter.txt"):
        with pytest.raises(InputError, match="no demo world"):
            make_world(out, **TINY)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_a_crash_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mmkit.data.world.write, "_write_conversations", crash)
    with pytest.raises(KeyboardInterrupt):
        make_world(tmp_path / "world", train=8, heldout=4, image_size=32)
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_world_works(tmp_path: Path) -> None:
    make_world(tmp_path, train=8, heldout=4, image_size=32)
    assert len(open_pairs(str(tmp_path / "shards")).pairs) == 8
    assert len(read_vqa(tmp_path / "vqa_heldout_annotations.json", tmp_path / "vqa_heldout_questions.json")) == 4 * 5


def test_splits_share_no_combination_but_every_value() -> None:
    parts: dict[bool, list[Scene]] = {True: [], False: []}
    for number, scene in scenes(LARGE).items():
        parts[number > 900_000].append(scene)
    train, heldout = parts[False], parts[True]
    assert (len(train), len(heldout)) == (3000, 500)
    assert not {s.combination() for s in train} & {s.combination() for s in heldout}
    for side in (train, heldout):
        groups = [g for s in side for g in s.groups]
        assert {g.color for g in groups} == set(COLORS)
        assert {g.shape for g in groups} == set(SHAPES)
        assert {g.place for g in groups} == set(PLACES)
        assert {g.count for g in groups} == {1, 2, 3}
        assert {s.word for s in side} == {None, *WORDS}
        assert {len(s.groups) for s in side} == {1, 2}


def test_combination_ignores_counts_and_group_order() -> None:
    for scene in list(scenes(TINY).values()):
        assert Scene(scene.groups[::-1], scene.word).combination() == scene.combination()


def test_pictures_show_their_scene(world: Path) -> None:
    """The rows that hold a group are colourful, the others grey; the word's strip is bright where there is a word."""
    for number, scene in scenes(TINY).items():
        split = "heldout" if number > 900_000 else "train"
        image = decode_image((world / "images" / split / f"{number:012d}.jpg").read_bytes())
        assert image.size == (48, 48)
        values = np.asarray(image).astype(int)
        colour = values.max(-1) - values.min(-1)
        # The middle half of each row, as shapes may touch the border between two rows.
        full = {place for row, place in enumerate(PLACES) if colour[15 + row * 12 : 21 + row * 12].max() > 60}
        assert full == {g.place for g in scene.groups}, number
        assert (values[:12].min(-1).max() > 170) == (scene.word is not None), number


def test_captions_name_everything(world: Path) -> None:
    for split in ("train", "heldout"):
        captions = read_captions(world / f"captions_{split}.json")
        known = {n: s for n, s in scenes(TINY).items() if (n > 900_000) == (split == "heldout")}
        assert set(captions) == set(known)
        for number, texts in captions.items():
            assert len(texts) == 5
            assert len(set(texts)) >= 4  # one group and no word leave nothing to join in another way
            for text in texts:
                named = {c for c in COLORS if re.search(rf"\b{c}\b", text)}
                assert named == {g.color for g in known[number].groups}
                assert all(g.place in text and g.shape in text for g in known[number].groups)
                assert known[number].word is None or known[number].word in text.split()


def test_pairs_shards_and_captions_agree(world: Path) -> None:
    images = str(world / "images" / "train")
    coco = open_pairs(str(world / "captions_train.json"), SourceOptions(image_root=str(images)))
    rows = open_pairs(str(world / "pairs_train.jsonl"))
    shards = open_pairs(str(world / "shards"))
    assert [len(s.left_out) for s in (coco, rows, shards)] == [0, 0, 0]
    assert (len(coco.pairs), len(rows.pairs), len(shards.pairs)) == (200, 200, 40)
    assert [(p.image.path, p.caption) for p in rows.pairs] == [(p.image.path, p.caption) for p in coco.pairs]
    said = {(Path(p.image.path).stem, p.caption) for p in coco.pairs}
    assert {(p.key, p.caption) for p in shards.pairs} <= said
    for p in shards.pairs:
        assert p.image.read() == (world / "images" / "train" / f"{p.key}.jpg").read_bytes()
    # A shard with one way to say it each would teach only that way.
    assert len({p.caption.split()[0] for p in shards.pairs}) > 3


def test_conversations_are_accepted_whole(world: Path) -> None:
    for name, texts in (("llava_align_train.json", 0), ("llava_train.json", 1)):
        items, left_out = read_llava(world / name, image_root=world)[:2]
        assert left_out == []
        assert len(items) == 40 + texts
        assert sum(not item.images for item in items) == texts
        assert all(Path(picture.path).is_file() for item in items for picture in item.images)
    known = scenes(TINY)
    for item in items:
        if not item.images:
            continue
        scene = known[int(item.id)]
        assert len(item.turns) == (6 if scene.word is None else 7)
        short = [q for q, _ in item.turns if q.endswith("Answer the question using a single word or phrase.")]
        assert len(short) == 1
        for question, answer in item.turns:
            plain = question.removeprefix("<image>\n").split("\n")[0]
            if plain in CAPTION_REQUESTS:
                # A caption before the questions would answer them all from the text.
                assert (question, answer) == (item.turns[-1][0], captions(scene)[0])
            else:
                assert answer == truth(plain, scene), (plain, scene)


def test_probe_rows_have_one_group(world: Path) -> None:
    for split in ("train", "heldout"):
        rows = [json.loads(line) for line in (world / f"probe_{split}.jsonl").read_text().splitlines()]
        known = {n: s for n, s in scenes(TINY).items() if (n > 900_000) == (split == "heldout") and len(s.groups) == 1}
        assert len(rows) == len(known) > 0
        for row in rows:
            scene = known[int(Path(row["image"]).stem)]
            assert (world / row["image"]).is_file()
            group = scene.groups[0]
            assert (row["shape"], row["color"], row["count"], row["place"]) == (
                group.shape,
                group.color,
                group.count,
                group.place,
            )
            assert row["word"] == scene.word


def truth(question: str, scene: Scene) -> str:
    """The answer by looking at the scene; written apart from the generator."""
    groups = scene.groups

    def one(found: list[str]) -> str:
        assert len(found) == 1, f"{question} has {len(found)} answers in {scene}"
        return found[0]

    def kind(word: str) -> str:
        return word if word in SHAPES else {"crosses": "cross"}.get(word, word.removesuffix("s"))

    rules: list[tuple[str, Callable[[re.Match[str]], str]]] = [
        (r"Is there a word\?", lambda m: "yes" if scene.word else "no"),
        (r"Is there more than one color\?", lambda m: "yes" if len({g.color for g in groups}) > 1 else "no"),
        (r"Is there a (\w+)\?", lambda m: "yes" if m[1] in {g.shape for g in groups} else "no"),
        (r"Is there something (\w+)\?", lambda m: "yes" if m[1] in {g.color for g in groups} else "no"),
        (r"How many (\w+) are there\?", lambda m: one([str(g.count) for g in groups if g.shape == kind(m[1])])),
        (r"What color (?:is|are) the (\w+)\?", lambda m: one([g.color for g in groups if g.shape == kind(m[1])])),
        (r"What shape is (?:at|in) the (\w+)\?", lambda m: one([g.shape for g in groups if g.place == m[1]])),
        (r"Where (?:is|are) the (\w+)\?", lambda m: one([g.place for g in groups if g.shape == kind(m[1])])),
        (r"What word is written\?|What does the sign say\?|Which word can be read\?", lambda m: str(scene.word)),
    ]
    for pattern, answer in rules:
        if match := re.fullmatch(pattern, question):
            return answer(match)
    raise AssertionError(f"unknown question {question!r}")


def asked(folder: Path, split: str) -> list[tuple[str, dict[str, Any], VqaQuestion]]:
    """Question text, annotation row and what the scorer reads."""
    questions, annotations = folder / f"vqa_{split}_questions.json", folder / f"vqa_{split}_annotations.json"
    read = read_vqa(annotations, questions)
    texts = {q["question_id"]: q["question"] for q in load(questions)["questions"]}
    return [(texts[row["question_id"]], row, read[row["question_id"]]) for row in load(annotations)["annotations"]]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_answer_is_true(large: Path, split: str) -> None:
    known = scenes(LARGE)
    kinds: collections.Counter[str] = collections.Counter()
    for text, row, question in asked(large, split):
        answer = truth(text, known[row["image_id"]])
        assert row["multiple_choice_answer"] == answer
        assert vqa_accuracy(answer, question.answers, rule_2021) == 1.0
        assert collections.Counter(a["answer"] for a in question.answers)[answer] >= 8
        kinds[row["answer_type"]] += 1
    pictures = LARGE[split]
    assert kinds == {"yes/no": 2 * pictures, "number": pictures, "other": 2 * pictures}
    rows = load(large / f"textvqa_{split}.json")["data"]
    assert len(rows) == sum((n > 900_000) == (split == "heldout") and s.word is not None for n, s in known.items())
    for row in rows:
        answer = truth(row["question"], known[row["image_id"]])
        assert row["ocr_tokens"] == [answer]
        assert textvqa_accuracy(answer, row["answers"]) == 1.0


def test_guessing_by_the_question_scores_low(large: Path) -> None:
    votes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for text, row, _ in asked(large, "train"):
        votes[text][row["multiple_choice_answer"]] += 1
    best = {text: found.most_common(1)[0][0] for text, found in votes.items()}
    scores = [vqa_accuracy(best.get(text, "yes"), question.answers, rule_2021) for text, _, question in asked(large, "heldout")]
    assert 0.25 < np.mean(scores) <= 0.42


def test_yes_and_no_are_even(large: Path) -> None:
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    total: collections.Counter[str] = collections.Counter()
    for text, row, _ in asked(large, "train"):
        if row["answer_type"] == "yes/no":
            counts[text][row["multiple_choice_answer"]] += 1
            total[row["multiple_choice_answer"]] += 1
    # Coins, not a yes and a no for every picture: the second answer could be told from the first.
    assert abs(total["yes"] / total.total() - 0.5) < 4 * 0.5 / total.total() ** 0.5
    # No colour or shape of the question gives its answer away; two questions are about the word and the number of colours.
    assert len(counts) == len(COLORS) + len(SHAPES) + 2
    for text, found in counts.items():
        assert abs(found["yes"] / found.total() - 0.5) < 4 * 0.5 / found.total() ** 0.5, text


def test_one_word_for_all_scores_low(large: Path) -> None:
    train = collections.Counter(q.answers[0]["answer"] for q in read_textvqa(large / "textvqa_train.json").values())
    held = read_textvqa(large / "textvqa_heldout.json").values()
    word = train.most_common(1)[0][0]
    assert np.mean([textvqa_accuracy(word, [a["answer"] for a in q.answers]) for q in held]) <= 0.15


def test_file_names_and_sizes_are_told(world: Path) -> None:
    data = load(world / "captions_heldout.json")
    assert all((world / "images" / "heldout" / image["file_name"]).is_file() for image in data["images"])
    assert {(image["width"], image["height"]) for image in data["images"]} == {(48, 48)}
    named = set(re.findall(r"^\| ([^|]+) \|", (world / "README.md").read_text(), flags=re.M)) - {"file"}
    assert len(named) >= 7
