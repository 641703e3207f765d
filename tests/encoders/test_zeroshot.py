"""Zero-shot classification against explicit loops, and the prompts and names it goes by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mmkit.encoders import CaptionLabels, SuperClassHead
from mmkit.encoders.templates import class_names, fill, open_templates
from mmkit.encoders.text import TextTower
from mmkit.encoders.zeroshot import class_embeddings, tag_classes, zero_shot
from mmkit.errors import InputError

NAMES = ["red bus", "dog", "cat", "green tree", "blue car", "horse", "ship"]
TEMPLATES = ["a photo of a {}.", "the {} {}", "{} in {curly} braces"]


@pytest.fixture(scope="module")
def tower() -> TextTower:
    torch.manual_seed(0)
    return TextTower(24, embed_dim=16, width=32, heads=2, layers=2, context_length=16).eval()


def test_class_embeddings_are_means_of_normalised_prompts(tower: TextTower) -> None:
    found = class_embeddings(tower, NAMES, TEMPLATES, batch_size=4)
    for name, row in zip(NAMES, found, strict=True):
        total = torch.zeros(16)
        for prompt in (f"a photo of a {name}.", f"the {name} {name}", f"{name} in {{curly}} braces"):
            embedding = tower.encode_text(tower.tokenize([prompt]))[0]
            total += embedding / embedding.norm()
        torch.testing.assert_close(row, total / total.norm(), rtol=1e-4, atol=1e-5)


def test_zero_shot_equals_a_loop(tower: TextTower) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(40, 24), torch.randint(0, 7, (40,))
    classes = class_embeddings(tower, NAMES, TEMPLATES)
    result = zero_shot(tower, x, y, names=NAMES, templates=TEMPLATES)
    assert result.top5 is not None
    for i in range(40):
        picture = x[i] @ tower.image_projection.weight.detach().T
        cosines = [float(F.cosine_similarity(picture, row, dim=0)) for row in classes]
        ranked = sorted(range(7), key=lambda c: -cosines[c])
        assert result.correct[i] == (ranked[0] == int(y[i])) and result.top5[i] == (int(y[i]) in ranked[:5])
    assert result.accuracy == pytest.approx(sum(result.correct) / 40)
    assert result.settings == {"probe": "zeroshot", "prompts": 3, "num_classes": 7}
    assert zero_shot(tower, x, y % 2, names=NAMES[:2], templates=TEMPLATES).top5 is None


def test_tags_equal_a_loop() -> None:
    torch.manual_seed(2)
    labels, head = CaptionLabels("clip"), SuperClassHead(12, 49_408).eval()
    x, y = torch.randn(9, 12), torch.randint(0, 7, (9,))
    result = tag_classes(head, labels, x, y, names=NAMES)
    with torch.no_grad():
        scores = head.logits(x) - head.logits(x).mean(0)
    for i in range(9):
        ranked = [scores[i, labels.encode_one(name)].mean().item() for name in NAMES]
        assert result.correct[i] == (max(range(7), key=ranked.__getitem__) == int(y[i]))
    assert result.top5 is not None and result.settings["tokens"] == len({t for name in NAMES for t in labels.encode_one(name)})


def test_tags_find_what_the_head_knows_and_frequent_words_do_not_win() -> None:
    labels, head = CaptionLabels("clip"), SuperClassHead(4, 49_408).eval()
    with torch.no_grad():
        head.weight.zero_()
        for direction, name in enumerate(("dog", "cat", "horse", "ship")):
            head.weight[labels.encode_one(name), direction] = 1.0
        head.bias[labels.encode_one("dog")] = 5.0
    x, y = 3 * torch.eye(4), torch.arange(4)
    names = ["dog", "cat", "horse", "ship"]
    assert tag_classes(head, labels, x, y, names=names).accuracy == 1.0
    # By logits as they are every picture would be a dog.
    with torch.no_grad():
        plain = torch.stack([head.logits(x)[:, labels.encode_one(name)].mean(1) for name in names])
    assert plain.argmax(0).tolist() == [0, 0, 0, 0]


def test_a_name_without_labels_is_refused() -> None:
    labels = CaptionLabels("clip", stop_words=["dog"])
    with pytest.raises(InputError, match=r"labels clip: no label .* in the class name 'dog'; name the classes by data.classes"):
        tag_classes(SuperClassHead(4, 49_408), labels, torch.ones(1, 4), torch.zeros(1, dtype=torch.int64), names=["dog", "cat"])


def test_templates(tmp_path: Path) -> None:
    openai = open_templates("openai")
    assert len(openai) == 80 and openai[0] == "a bad photo of a {}." and all("{}" in t for t in openai)
    assert fill(open_templates("plain"), "dog") == ["a photo of a dog."]
    (tmp_path / "t.txt").write_text("{} here\n\n  a {}\n")
    assert open_templates(str(tmp_path / "t.txt")) == ("{} here", "a {}")
    (tmp_path / "t.txt").write_text("{} here\na dog\n")
    with pytest.raises(InputError, match=r"t\.txt:2: no \{\} for the class"):
        open_templates(str(tmp_path / "t.txt"))
    with pytest.raises(InputError, match="absent: no such file; use openai, plain, or a file"):
        open_templates("absent")


def test_class_names(tmp_path: Path) -> None:
    def names(classes: list[str], content: object, suffix: str = ".json") -> list[str]:
        file = tmp_path / f"names{suffix}"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return class_names(classes, str(file))

    assert class_names(["fire_truck", "dog"], None) == ["fire truck", "dog"]
    # By number; the file may hold more than the data use.
    assert names(["2", "0"], ["a", "b", "c"]) == ["c", "a"]
    assert names(["2", "0"], "a\nb\nc\n", ".txt") == ["c", "a"]
    # By key.
    assert names(["n02", "n01"], {"n01": "tench", "n02": "shark", "n03": "ray"}) == ["shark", "tench"]
    # One for each sorted class; but names that are the classes themselves are never given to others.
    assert names(["n02", "n01"], ["tench", "shark"]) == ["shark", "tench"]
    assert names(["dog", "cat"], ["dog", "cat", "bird"]) == ["dog", "cat"]
    imagenet = class_names([str(i) for i in range(1000)], "imagenet")
    assert imagenet[0] == "tench" and class_names([f"n{i:03d}" for i in range(1000)], "imagenet") == imagenet


@pytest.mark.parametrize(
    ("classes", "content", "message"),
    [
        (["3"], ["a", "b"], r"2 names \(numbers 0 to 1\), but there is a class 3"),
        (["a", "b"], ["x"], "1 names for 2 classes"),
        (["a", "b"], {"a": "x"}, "no name for class b"),
        (["a"], {"a": 1}, "no class names"),
        (["a"], [], "no class names"),
        (["a"], "text", "no class names"),
    ],
)
def test_class_names_that_do_not_fit_are_refused(tmp_path: Path, classes: list[str], content: object, message: str) -> None:
    (tmp_path / "names.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"names\.json: {message}; give data.classes a JSON list"):
        class_names(classes, str(tmp_path / "names.json"))
