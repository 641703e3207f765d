from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path

import pytest
from report_runs import row, score

from mmkit.errors import InputError
from mmkit.eval.report import build_report
from mmkit.eval.report.exports import escape_markdown
from mmkit.eval.report.render import probability, source_hash
from mmkit.eval.report.view import duration, hardware_of

EVIL = '<script>alert("x")</script> | **bold** [a](http://evil.example/x) &amp; `code`\n# head $x$'
VOID = {"meta", "img", "br", "line", "path", "use", "rect", "input"}


class Page(html.parser.HTMLParser):
    """Collects tags and attributes, and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"
        # Cells are words apart, whatever stands between their tags.
        self.text += " " if tag in ("td", "th", "summary") else ""

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append((self.tags[-1][1], data))
        elif not self.open or self.open[-1] != "style":
            self.text += data


def assert_self_contained(text: str) -> Page:
    """Nothing to fetch, nothing to run but the page's own script, of which the policy has the hash."""
    page = Page(text)
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        assert not any(name.startswith("on") or name == "style" for name in attrs), attrs
        for name in ("src", "href", "srcset", "poster", "action", "data"):
            assert (attrs.get(name) or "#").startswith(("data:image/", "#")), (tag, attrs)
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", text)
    (policy,) = [attrs["content"] or "" for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-") and "unsafe" not in policy
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert f"'{source_hash(style)}'" in policy
    own = [source for attrs, source in page.scripts if attrs.get("type") not in ("application/json", "text/plain")]
    assert len(own) <= 1 and all(f"script-src '{source_hash(source)}'" in policy for source in own)
    return page


def test_writes_five_files_and_the_same_again(world: list[Path], tmp_path: Path) -> None:
    path = build_report(world, tmp_path / "out", title="A title", gallery=5)
    assert path == tmp_path / "out" / "report.html"
    assert sorted(p.name for p in path.parent.iterdir()) == [f"report.{e}" for e in ("csv", "html", "json", "md", "tex")]
    build_report(world, tmp_path / "again", title="A title", gallery=5)
    for file in path.parent.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_html_is_self_contained_and_says_it_all(world: list[Path], tmp_path: Path) -> None:
    text = build_report(world, tmp_path / "out").read_text()
    page = assert_self_contained(text)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "@media print" in text
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        "Scores", "Differences", "Probes", "Training curves", "Gallery", "Score conditions", "Data and what was left out",
        "Lineage",
    ]  # fmt: skip
    words = " ".join(page.text.split())
    for part in (
        "SuperClass, random frozen and blind are compared on coco-caption, vqav2, linear-probe and knn, "
        "from 5 evaluation runs, 2 probe runs and 8 training runs.",
        "2026-11-23T10:00:00Z", "0123456789ab", "Test CPU, 2 cores; no GPU", "torch 2.15.0", "CIDEr ×100", "Accuracy %",
        "drawn at random with seed 0", "not chosen for good or bad answers", "shown instead:",
        "2 × the file is empty", "1 × cut off", "llava, step 2", "stage: superclass",
    ):  # fmt: skip
        assert part in words, part
    assert "flash" not in words  # an absent package is no condition
    assert {"right", "wrong", "lower"} <= set(re.findall(r"\b(?:right|wrong|lower)\b", words))
    headers = [attrs for tag, attrs in page.tags if tag == "th"]
    assert headers and all(attrs.get("scope") for attrs in headers)
    assert sum(tag == "img" and not attrs.get("alt") for tag, attrs in page.tags) == 0
    anchors = {(attrs["href"] or "")[1:] for tag, attrs in page.tags if tag == "a"}
    assert anchors <= {attrs.get("id") for _, attrs in page.tags}


def test_json_holds_the_figures(world: list[Path], tmp_path: Path) -> None:
    build_report(world, tmp_path / "out", gallery=3)
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    scores = json.loads((world[0] / "scores.json").read_text())["tasks"]["coco-caption"]
    first = found["systems"][0]
    assert first["system"] == "SuperClass" and first["tasks"]["coco-caption"]["metrics"] == scores["metrics"]
    assert [d["verdict"] for d in found["differences"]] == ["lower"] * 4
    assert [c["stage"] for c in found["curves"]] == ["superclass", "clipcap", "llava", "llava, step 2"]
    assert len(found["gallery"]) == 3 and len(found["runs"]) == 15
    assert found["columns"][0] == {"task": "coco-caption", "variant": "", "metrics": ["CIDEr", "Bleu_4"]}
    speed = found["speed"][0]["curves"][0]
    assert set(speed) == {"system", "run", "samples_per_second", "data_wait"} and len(speed["data_wait"]) == 60
    assert found["data"][0] == {"run": "superclass-encoder", "fingerprint": "d" * 32, "samples": None, "facts": ""}
    skipped = next(s for s in found["skipped"] if s["run"] == "superclass-captions")
    assert skipped == {"run": "superclass-captions", "total": 3, "reasons": {"the file is empty": 2, "cut off": 1}}


def test_published_figures_warnings_and_types_are_on_the_page(rich: list[Path], tmp_path: Path) -> None:
    page = assert_self_contained(build_report(rich, tmp_path / "out", gallery=3).read_text())
    words = " ".join(page.text.split())
    markdown = (tmp_path / "out" / "report.md").read_text()
    for part in (
        "LLaVA-1.5 7B textvqa-val, Accuracy % 58.2 LLaVA MODEL_ZOO val, with OCR",
        "SuperClass, textvqa-val: 3 of 28 answers have more than 5 words and can hardly match",
        "a part only, textvqa-val: 10 samples, the column's first has 28",
        "with OCR, textvqa-val: not compared with SuperClass, OCR is reference, there none",
        "empty 0 (0.0 %), long 3 (10.7 %), unparsed 2 (7.1 %), defaulted 0 (0.0 %)",
        "textvqa-val by question type, Accuracy % Question type n SuperClass random frozen with OCR a part only "
        "what 14 50.0 50.0 50.0 50.0",
        "Samples that superclass-captions skipped Sample Source Reason 7 a.tar the file is empty",
    ):
        assert part in words, part
    for part in (
        "_LLaVA-1.5 7B, published_",
        "_58.2_",
        "58.2 as published in LLaVA MODEL\\_ZOO, val",
        "textvqa-val (OCR none): Accuracy %",
        "100.0 ≠ (!)",
        "(!) SuperClass",
        "≠",
    ):
        assert part in markdown, part
    assert_tables(markdown, tables=8)


def test_markdown_tables_are_whole(world: list[Path], tmp_path: Path) -> None:
    build_report(world, tmp_path / "out", gallery=3)
    assert_tables((tmp_path / "out" / "report.md").read_text(), tables=8)


def assert_tables(text: str, *, tables: int) -> None:
    """Every table has as many cells in each row as in its head."""
    blocks = [b.splitlines() for b in text.split("\n\n") if b.startswith("|")]
    assert len(blocks) == tables
    for block in blocks:
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block}
        assert len(counts) == 1 and len(block) > 2 and re.fullmatch(r"(\| -+:? )+\|", block[1]), block


@pytest.fixture
def hostile(runs) -> list[Path]:
    """Markup in every field that comes from data, no picture, NaN, lone surrogates."""
    texts = {"prompt": EVIL + "{question}", "question": EVIL}
    rows = [row(i, Path(f"<b>{i}.png"), EVIL + "\ud800", [EVIL, "x|y"], {"accuracy": 0.3}, **texts) for i in range(3)]
    encoder = runs.train("enc<i>", EVIL, system=EVIL)
    skipped = [{"source": "s", "key": "k", "reason": EVIL}]
    settings = {"rule": EVIL, EVIL: EVIL}
    paths = [runs.eval(n, EVIL + n, {"vqav2": rows}, model=encoder, settings=settings, git=EVIL, skipped=9) for n in "ab"]
    (paths[0] / "skipped.jsonl").write_text(json.dumps(skipped[0]) + "\n")
    (paths[0] / "recipe.yaml").write_text(EVIL)
    scores = json.loads((paths[1] / "scores.json").read_text())
    scores["tasks"]["vqav2"]["metrics"]["other"] = float("nan")
    (paths[1] / "scores.json").write_text(json.dumps(scores))
    return paths


def test_nothing_from_data_is_markup(hostile: list[Path], tmp_path: Path) -> None:
    text = build_report(hostile, tmp_path / "out", title=EVIL).read_text()
    page = assert_self_contained(text)
    # Its own script, and the gallery's data, in which no text can end the element.
    assert text.count("<script") == 3 and "&lt;script&gt;" in text and '<script>alert("x")</script>' in page.text
    (data,) = [json.loads(source) for attrs, source in page.scripts if attrs.get("id") == "gallery-data"]
    assert data["samples"][0][4] == EVIL and "\\u003cscript>" in text
    assert "<b>0" not in text and "enc<i>" not in text
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "<script>" not in markdown and not re.search(r"(?<!\\)\]\(http", markdown) and "\n# head" not in markdown
    assert_tables(markdown, tables=6)
    found = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    assert found["systems"][1]["tasks"]["vqav2"]["metrics"]["other"] is None


def test_missing_pictures_are_placeholders_and_listed(hostile: list[Path], tmp_path: Path) -> None:
    text = build_report(hostile, tmp_path / "out").read_text()
    assert text.count('class="placeholder"') == 3
    assert "Picture not shown: &lt;b&gt;0.png (file not found)" in text
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sorted(p["name"] for p in found["missing_pictures"]) == ["<b>0.png", "<b>1.png", "<b>2.png"]
    assert "skipped.jsonl lists 1" in text  # the manifest counts nine


@pytest.mark.parametrize("kind", ["train", "probe"])
def test_reports_of_one_kind_leave_the_other_sections_out(runs, tmp_path: Path, kind: str) -> None:
    path = runs.train("enc", "superclass") if kind == "train" else runs.probe("probe", "Mine", 0.9)
    text = build_report([path], tmp_path / "out").read_text()
    assert_self_contained(text)
    middle = "Training curves" if kind == "train" else "Probes"
    assert re.findall(r"<h2>(.*?)</h2>", text) == [middle, "Data and what was left out", "Lineage"]
    assert "No run skipped a sample." in text and "No run skipped a sample." in (tmp_path / "out" / "report.md").read_text()


def test_a_task_without_a_figure_still_says_why(runs, tmp_path: Path) -> None:
    told = "a test set without answers has no score here; the file for the server is submission/x.json"
    task = {"task": "vqav2", "metrics": {}, "n": 3, "settings": {"notes": [told]}, "answers": {"total": 3, "empty": 1}}
    rows = [{**row(i, runs.picture("a.png"), "x", [], {}, question="q"), "task": "vqav2-test-dev"} for i in range(3)]
    path = runs.run("a", "eval", manifest={"system": "A"}, scores={"vqav2-test-dev": task}, predictions=rows)
    page = assert_self_contained(build_report([path], tmp_path / "out").read_text())
    words = " ".join(page.text.split())
    assert (
        "No task of these runs has a figure." in words and f"A, vqav2-test-dev: {told}" in words and "empty 1 (33.3 %)" in words
    )
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "No task of these runs has a figure." in markdown and "a test set without answers" in markdown


def test_answers_that_are_not_there_are_missed_aloud(runs, tmp_path: Path) -> None:
    rows = [row(i, Path("a.png"), "x", ["x"], {"accuracy": 1.0}, question="q") for i in range(3)]
    path = runs.eval("a", "A", {"vqav2": rows})
    (path / "predictions.jsonl").unlink()
    text = build_report([path], tmp_path / "out").read_text()
    assert "a: it has no predictions.jsonl, so that its answers are not in the gallery" in text


def test_many_systems_and_tasks_are_counted_in_the_first_sentence(runs, tmp_path: Path) -> None:
    scores = {f"task{i}": score("gqa", {"accuracy": 0.5}) for i in range(9)}
    paths = [runs.run(f"r{i}", "eval", manifest={"system": f"S{i}"}, scores=scores) for i in range(10)]
    text = build_report(paths, tmp_path / "out").read_text()
    assert "<p>10 systems (S0, S1, S2, …) are compared on 9 tasks (task0, task1, task2, …), from 10 evaluation runs.</p>" in text


def test_refusals(world: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gallery is -1"):
        build_report(world, tmp_path / "out", gallery=-1)
    with pytest.raises(InputError, match="thumbnail is 31; give the longest side in px, from 32 to 512"):
        build_report(world, tmp_path / "out", thumbnail=31)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file, not a folder"):
        build_report(world, tmp_path / "file")
    assert not (tmp_path / "out").exists()


def test_markdown_escapes() -> None:
    assert escape_markdown("a|b\n*c* <d> & _e_ \\") == "a\\|b \\*c\\* &lt;d&gt; &amp; \\_e\\_ \\\\"
    assert escape_markdown(3) == "3"


def test_small_words() -> None:
    assert [duration(s) for s in (5, 300, 9000)] == ["5 s", "5.0 min", "2.5 h"]
    assert [probability(p) for p in (0.0002, 0.0123, 0.4321)] == ["<\u00a00.001", "0.012", "0.43"]
    gpus = {"gpus": ["H200", "H200"], "cpu": "X", "driver": 550}
    assert hardware_of(gpus) == "X; 2 × H200; driver 550" and hardware_of("laptop") == "laptop" and hardware_of(None) == ""
