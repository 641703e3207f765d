"""LaTeX and CSV; Markdown and JSON stand in test_report_render.py."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_runs import LLAVA, Runs, row

from mmkit.eval.report import build_report
from mmkit.eval.report.exports import FIELDS
from mmkit.eval.report.latex import escape_latex


@pytest.fixture
def folder(rich: list[Path], tmp_path: Path) -> Path:
    return build_report(rich, tmp_path / "out", gallery=2).parent


def test_latex_has_the_best_in_bold_and_references_in_grey(folder: Path) -> None:
    text = (folder / "report.tex").read_text()
    tables = re.findall(r"\\begin\{tabular\}\{l(r+)\}(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert len(tables) == 2 and text.startswith("% Packages: \\usepackage{booktabs,xcolor}\n")
    for columns, body in tables:
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        # \multicolumn{k} stands for k cells.
        widths = {sum(int(n) for n in re.findall(r"\\multicolumn\{(\d+)\}", r)) or len(re.findall(r"(?<!\\)&", r)) for r in rows}
        assert widths == {len(columns)}
        assert re.findall(r"\\(toprule|midrule|bottomrule)", body)[0] == "toprule"
    assert r"\textcolor{gray}{LLaVA-1.5 7B (published)}" in text and r"\textcolor{gray}{58.2}" in text
    assert "58.2}}" not in text  # a published figure is never the best
    assert r"textvqa-val (OCR none)" in text and "$^{*}$" in text and r"100.0$^{\dagger\ddagger}$" in text


def compiled(body: str, folder: Path) -> str:
    """The log of pdfLaTeX on a document with the packages that the tables' first line names, and no others."""
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex on PATH (Debian: apt install texlive-latex-base texlive-latex-recommended)")
    (packages,) = re.findall(r"^% Packages: (\S+)$", body, re.MULTILINE)
    (folder / "all.tex").write_text(f"\\documentclass{{article}}{packages}\\begin{{document}}\n{body}\\end{{document}}\n")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    log = (folder / "all.log").read_text(encoding="utf-8", errors="replace")
    assert done.returncode == 0, log[-2000:]
    return log


def test_latex_compiles(folder: Path, tmp_path: Path) -> None:
    compiled((folder / "report.tex").read_text(), tmp_path)


# Printable ASCII, everything Latin, Greek, and what no LaTeX font has: other scripts, emoji of several signs, control signs.
LETTERS = ["".join(map(chr, range(first, first + 32))) for first in (*range(32, 128, 32), *range(0xA0, 0x250, 32), 0x370, 0x3B0)]
NAMES = [
    "[ours]", "*ours", "[2ex] & 50 %", "a_b^c ~ #1 $x$ {y} \\cmd \\", "lr 1e--4---x", "SuperClass ViT-L/16 “α = 0.5”",
    "模型 甲", "نموذج", "👩‍🔬 model", "Łódź, Čapek, Ångström, Ţepeş, Ærø", "tab\tnul\x00esc\x1bdel\x7f", "\ud800", *LETTERS,
]  # fmt: skip


def test_latex_compiles_whatever_the_names_are(runs: Runs, tmp_path: Path) -> None:
    paths = []
    for i, name in enumerate(NAMES):
        rows = {name: [row(k, Path(f"{k}.png"), "x", ["x"], {"accuracy": 0.5}, question="q") for k in range(3)]}
        paths.append(runs.eval(f"run{i}", name, rows, settings={"rule": name}, more={"published": [{**LLAVA, "system": name}]}))
    folder = build_report(paths, tmp_path / "out", gallery=0, title="\n\\end{x} % \x00" + NAMES[3]).parent
    compiled((folder / "report.tex").read_text(encoding="utf-8"), tmp_path)


def test_latex_escapes() -> None:
    assert escape_latex("a_b & 50 % of {x} #1 $y$ ~ ^ \\cmd\nz") == (
        r"a\_b \& 50 \% of \{x\} \#1 \$y\$ \textasciitilde{} \textasciicircum{} \textbackslash{}cmd z"
    )
    # At the head of a row these two would be taken by the end of the row above.
    assert escape_latex("[a] *b") == "{[}a] {*}b" and escape_latex("a--b–c") == r"a-{}-b\textendash{}c"
    assert escape_latex("é ß α ≤ ą 中") == r"é ß $\alpha$ $\leq$ \mmkitletter{ą}{U+0105} \mmkitletter{中}{U+4E2D}"
    assert escape_latex("\x07\ud800") == "{[}U+0007]{[}U+D800]"


def test_csv_has_every_figure_with_its_conditions(folder: Path) -> None:
    with (folder / "report.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == list(FIELDS)
    first = lines[0]
    assert (first["system"], first["task"], first["metric"]) == ("SuperClass", "coco-caption", "CIDEr")
    assert float(first["low"]) < float(first["value"]) < float(first["high"]) and first["n"] == "15"
    (published,) = [line for line in lines if line["published"] == "yes" and "none" not in line["comparable"]][:1]
    assert published["system"] == LLAVA["system"] and float(published["value"]) == 0.582
    assert published["source"] == LLAVA["source"] and published["conditions"] == LLAVA["conditions"] and published["best"] == "no"
    tested = [line for line in lines if line["p_holm"]]
    assert tested and all(0 < float(line["p"]) <= float(line["p_holm"]) <= 1 for line in tested)
    part = next(line for line in lines if line["system"] == "a part only")
    assert part["comparable"] == "10 samples, the column's first has 28" and part["best"] == "no"
    assert any("OCR: reference" in line["conditions"] for line in lines)


def test_csv_has_published_figures_as_they_were_published(runs: Runs, tmp_path: Path) -> None:
    rows = {"coco-caption": [row(1, Path("a.png"), "x", ["x"], {"CIDEr": 1.0})]}
    published = [{"system": "ClipCap", "metrics": {"CIDEr": 1.1308}, "source": "paper", "conditions": ""}]
    out = build_report([runs.eval("a", "a", rows, more={"published": published})], tmp_path / "out").parent
    with (out / "report.csv").open(newline="", encoding="utf-8") as file:
        line = list(csv.DictReader(file))[-1]
    assert (line["published"], line["value"], line["printed"]) == ("yes", "1.1308", "113.1")


def test_csv_runs_nothing_in_a_spreadsheet(runs: Runs, tmp_path: Path) -> None:
    rows = {"vqav2": [row(1, Path("a.png"), "x", ["x"], {"accuracy": 1.0}, question="q")]}
    out = build_report([runs.eval("a", '=HYPERLINK("http://evil.example")', rows)], tmp_path / "out").parent
    with (out / "report.csv").open(newline="", encoding="utf-8") as file:
        (line,) = csv.DictReader(file)
    assert line["system"] == '\'=HYPERLINK("http://evil.example")'
