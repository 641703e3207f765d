"""`mmkit data inspect` over pictures: what it finds, the same with any number of processes, and the page it writes."""

from __future__ import annotations

import html.parser
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mmkit.data.inspect import inspect_pairs
from mmkit.data.scan.page import histogram
from mmkit.data.scan.tally import Tally
from mmkit.data.sources import SourceOptions
from mmkit.errors import InputError

EVIL = "<script>alert(1)</script> | `x` <img src=x onerror=alert(1)> \"'&amp;"
BAD = {
    "bomb_900_megapixels.png": "its header claims more pixels than the limit",
    "truncated.jpg": "cannot be decoded",
    "zero_bytes.jpg": "the file is empty",
    "text_named.jpg": "is no picture",
}
PAGES = ("inspect.html", "inspect.md", "inspect.json", "skipped.jsonl", "duplicates.jsonl")


class Reader(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.attributes: set[str] = set()
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def folder(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound pictures, an equal one, one that looks alike, plain ones, and bad ones; captions that try to be markup."""
    folder = tmp_path_factory.mktemp("pictures")
    names = sorted(path.name for path in (shared / "coco-mini/images/val").iterdir())[:3]
    for name in names:
        shutil.copy(shared / "coco-mini/images/val" / name, folder / name)
    shutil.copy(folder / names[0], folder / "z_equal.jpg")
    Image.open(folder / names[1]).resize((200, 150)).save(folder / "z_small.png")
    for colour in ("red", "blue"):
        Image.new("RGB", (32, 24), colour).save(folder / f"{colour}.png")
    for name in BAD:
        shutil.copy(shared / "broken" / name, folder / name)
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text(EVIL if path.name in (names[0], "red.png", "blue.png") else f"picture {path.stem}")
    return folder


def test_what_the_pictures_are(folder: Path, tmp_path: Path) -> None:
    found = inspect_pairs(str(folder), workers=1, out=tmp_path)
    facts = found.pictures
    assert facts is not None
    assert (found.pairs, found.skipped.total, facts.distinct, facts.plain) == (7, 4, 7, 2)
    assert facts.formats == {"JPEG RGB": 4, "PNG RGB": 3}
    assert (facts.tallies["height"].quantile(0), facts.tallies["width"].most, facts.tallies["kib"].quantile(0)) == (24, 448, 1)
    rows = [json.loads(line) for line in (tmp_path / "duplicates.jsonl").read_text().splitlines()]
    first, second = sorted(path.name for path in folder.glob("000*.jpg"))[:2]
    assert [(row["kind"], row["group"], row["key"]) for row in rows] == [
        ("equal", 0, first), ("equal", 0, "z_equal.jpg"), ("alike", 0, second), ("alike", 0, "z_small.png"),
    ]  # fmt: skip
    skipped = {row["key"]: row["reason"] for row in map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())}
    assert set(skipped) == set(BAD) and all(BAD[key] in reason for key, reason in skipped.items())
    numbers = json.loads((tmp_path / "inspect.json").read_text())
    assert numbers["pictures"]["equal"] == {"groups": 1, "surplus": 1}
    assert numbers["captions"]["repeated"] == {"groups": 1, "surplus": 2}
    assert numbers["captions"]["characters"]["n"] == numbers["pairs"] == 7
    assert "equal pictures: 1 could go, in 1 groups" in found.lines()
    assert "left out: 4" in found.lines() and "captions that another pair has too: 2" in found.lines()


def test_the_number_of_processes_changes_nothing(folder: Path, shared: Path, tmp_path: Path) -> None:
    for data in (folder, shared / "coco-mini/pairs_train.jsonl"):
        for workers in (1, 2):
            inspect_pairs(str(data), workers=workers, out=tmp_path / str(workers), sample=4)
        for name in PAGES:
            assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_captions_of_one_picture_are_no_duplicates(shared: Path) -> None:
    found = inspect_pairs(str(shared / "coco-mini/pairs_train.jsonl"), workers=1)
    assert found.pictures is not None
    assert (found.pairs, found.pictures.distinct, len(found.pictures.equal), len(found.pictures.alike)) == (400, 80, 0, 0)
    assert found.pictures.tallies["width"].size == 80


def test_nothing_of_the_data_is_markup(folder: Path, tmp_path: Path) -> None:
    inspect_pairs(str(folder), workers=1, out=tmp_path)
    text = (tmp_path / "inspect.html").read_text()
    page = Reader(text)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert not {name for name in page.attributes if name.startswith("on")}
    # Without network: every picture is in the page.
    assert page.sources and all(source.startswith("data:image/") for source in page.sources)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert sum(part == EVIL for part in page.text) >= 3
    assert all(reason in text for reason in BAD.values())
    markdown = (tmp_path / "inspect.md").read_text()
    assert "<script" not in markdown and "<img" not in markdown and "&lt;script&gt;" in markdown
    widths = {line.count("|") - line.count(r"\|") for line in markdown.splitlines() if line.startswith("| ") and "script" in line}
    assert widths == {3}


def test_odd_captions_show_as_text(shared: Path, tmp_path: Path) -> None:
    found = inspect_pairs(str(shared / "broken/odd_captions.tar"), workers=1, out=tmp_path)
    assert (found.pairs, found.skipped.total) == (18, 4)
    page = Reader((tmp_path / "inspect.html").read_text())
    assert "a dog &amp; a cat <br/> on a table" in page.text
    assert "<|startoftext|>a dog<|endoftext|> </s> <image> <pad> [INST]" in page.text
    assert "br" not in page.tags and "image" not in page.tags
    # The long one is cut, and says so.
    assert any(part.endswith("(20000 characters)") for part in page.text)


def test_without_pictures_none_is_opened(folder: Path, tmp_path: Path) -> None:
    found = inspect_pairs(str(folder), workers=1, pictures=False, out=tmp_path)
    assert (found.pairs, found.skipped.total, found.pictures) == (11, 0, None)
    assert json.loads((tmp_path / "inspect.json").read_text())["pictures"] is None
    text = (tmp_path / "inspect.html").read_text()
    assert "The pictures were not looked at" in text and "<img" not in text
    assert (tmp_path / "duplicates.jsonl").read_text() == ""


def test_options_have_effects(folder: Path, shared: Path, tmp_path: Path) -> None:
    inspect_pairs(str(folder), workers=1, out=tmp_path / "a", sample=2)
    assert "2 of 7 pictures, drawn at random with seed 0" in (tmp_path / "a/inspect.html").read_text()
    found = inspect_pairs(str(folder), workers=1, limit=3)
    assert found.survey.records.shape == (3,)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"picture": "good.jpg", "text": "a red bus"}\n')
    found = inspect_pairs(
        str(rows), workers=1, options=SourceOptions(image_root=str(shared / "broken"), image="picture", caption="text")
    )
    assert (found.pairs, found.pictures and found.pictures.distinct) == (1, 1)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file, not a folder"):
        inspect_pairs(str(folder), workers=1, out=tmp_path / "file")


def test_a_set_of_bad_pictures_alone_is_told_not_refused(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    shutil.copy(shared / "broken/zero_bytes.jpg", tmp_path / "bad/a.jpg")
    (tmp_path / "bad/a.txt").write_text("a dog")
    found = inspect_pairs(str(tmp_path / "bad"), workers=1, out=tmp_path / "out")
    assert (found.pairs, found.left_out) == (0, {"the file is empty": 1})
    assert "formats: none" in found.lines()
    assert "the file is empty" in (tmp_path / "out/inspect.html").read_text()


def test_histograms_are_drawn_of_numbers_alone() -> None:
    assert histogram(Tally(), "px") == ""
    one = str(histogram(Tally().add([5, 5]), "px"))
    assert one.count("<rect") == 1 and "<title>5 px: 2</title>" in one
    many = str(histogram(Tally().add(range(1, 100_000, 7)), "px"))
    assert many.count("<rect") <= 32 and "99,996" in many
