from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from report_runs import row

from mmkit.errors import InputError
from mmkit.eval.report import build_report
from mmkit.eval.report.render import escape_markdown
from mmkit.eval.report.view import duration, hardware_of

EVIL = '<script>alert("x")</script> | **bold** [a](http://evil.example/x) &amp; `code`\n# head $x$'
VOID = {"meta", "img", "br", "line", "path", "use", "rect"}


class Page(html.parser.HTMLParser):
    """Collects tags and attributes, and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
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

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_self_contained(text: str) -> Page:
    page = Page(text)
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form"), tag
        assert not any(name.startswith("on") for name in attrs), attrs
        for name in ("src", "href", "srcset", "poster", "action", "data"):
            assert (attrs.get(name) or "#").startswith(("data:image/", "#")), (tag, attrs)
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", text)
    return page


def test_writes_three_files_and_the_same_again(world: list[Path], tmp_path: Path) -> None:
    path = build_report(world, tmp_path / "out", title="A title", gallery=5)
    assert path == tmp_path / "out" / "report.html"
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json", "report.md"]
    build_report(world, tmp_path / "again", title="A title", gallery=5)
    for file in path.parent.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_html_is_self_contained_and_says_it_all(world: list[Path], tmp_path: Path) -> None:
    text = build_report(world, tmp_path / "out").read_text()
    page = assert_self_contained(text)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "@media print" in text
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        "Scores", "Differences", "Probes", "Training curves", "Gallery", "Score conditions", "What was left out", "Lineage",
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
    skipped = next(s for s in found["skipped"] if s["run"] == "superclass-captions")
    assert skipped == {"run": "superclass-captions", "total": 3, "reasons": {"the file is empty": 2, "cut off": 1}}


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
    assert "<script>" not in text and "&lt;script&gt;" in text and '<script>alert("x")</script>' in page.text
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
    assert re.findall(r"<h2>(.*?)</h2>", text) == [middle, "What was left out", "Lineage"]
    assert "No run skipped a sample." in text and "No run skipped a sample." in (tmp_path / "out" / "report.md").read_text()


def test_refusals(world: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gallery is -1"):
        build_report(world, tmp_path / "out", gallery=-1)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file, not a folder"):
        build_report(world, tmp_path / "file")
    assert not (tmp_path / "out").exists()


def test_markdown_escapes() -> None:
    assert escape_markdown("a|b\n*c* <d> & _e_ \\") == "a\\|b \\*c\\* &lt;d&gt; &amp; \\_e\\_ \\\\"
    assert escape_markdown(3) == "3"


def test_small_words() -> None:
    assert [duration(s) for s in (5, 300, 9000)] == ["5 s", "5.0 min", "2.5 h"]
    gpus = {"gpus": ["H200", "H200"], "cpu": "X", "driver": 550}
    assert hardware_of(gpus) == "X; 2 × H200; driver 550" and hardware_of("laptop") == "laptop" and hardware_of(None) == ""


def chromium(page: Path, profile: Path, *flags: str) -> str:
    """Run headless Chromium on a page, without any network."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on PATH")
    flags += ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
    flags += ("--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND")
    command = [browser, *flags, f"--user-data-dir={profile}", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture
def wide(runs) -> Path:
    """Many score columns, seven systems with long names, and words without a place to break."""
    image = runs.picture("w" * 60 + ".png")
    metrics = dict.fromkeys(("CIDEr", "Bleu_4", "METEOR", "ROUGE_L", "SPICE"), 1.2345)
    paths = []
    for i in range(7):
        name = f"SuperClass ViT-L/16 with a long name, number {i}"
        tasks = {"coco-caption": [row(1, image, "x" * 200, ["y" * 200], metrics)]}
        tasks |= {
            t: [row(1, image, "x" * 90, ["y"], {"accuracy": 1.0}, question="q" * 90)] for t in ("vqav2", "textvqa+ocr", "gqa")
        }
        paths.append(runs.eval(f"run{i}", name, tasks, settings={"prompt": "p" * 300}))
    return build_report(paths, runs.root / "wide")


def test_chromium_draws_it(world: list[Path], tmp_path: Path) -> None:
    page = build_report(world, tmp_path / "out")
    assert_self_contained(page.read_text())
    shot = tmp_path / "shot.png"
    chromium(page, tmp_path / "profile", "--window-size=1280,1600", "--hide-scrollbars", f"--screenshot={shot}")
    with Image.open(shot) as image:
        assert image.size == (1280, 1600)
        colours = image.convert("RGB").getcolors(1 << 24)
        assert colours is not None and len(colours) > 100


def test_chromium_finds_no_overflow(world: list[Path], wide: Path, tmp_path: Path) -> None:
    # Copies that may run a script tell their overflow from inside frames (a window cannot be 420 px narrow).
    frames = "<body><p id=p></p><script>addEventListener('message', e => p.textContent += ' ' + e.data)</script>"
    tell = "<script>const root = document.documentElement; document.querySelectorAll('details').forEach(d => d.open = true);"
    tell += "parent.postMessage(NAME + innerWidth + ':' + (root.scrollWidth - root.clientWidth), '*')</script></body>"
    for name, page in (("usual", build_report(world, tmp_path / "out")), ("wide", wide)):
        text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())
        (tmp_path / f"{name}.html").write_text(text.replace("</body>", tell.replace("NAME", f"'{name}'")))
        for width in (1280, 800, 420):
            frames += f'<iframe src="{name}.html" style="width:{width}px;height:900px;border:0"></iframe>'
    (tmp_path / "frames.html").write_text(frames)
    dom = chromium(tmp_path / "frames.html", tmp_path / "profile", "--dump-dom", "--virtual-time-budget=5000")
    overflow = dict(pair.split(":") for pair in re.findall(r"(?:usual|wide)\d+:\d+", dom))
    assert overflow == {f"{name}{width}": "0" for name in ("usual", "wide") for width in (1280, 800, 420)}
