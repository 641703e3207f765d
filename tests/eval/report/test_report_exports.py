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
from mmkit.eval.report.exports import FIELDS, escape_latex


@pytest.fixture
def folder(rich: list[Path], tmp_path: Path) -> Path:
    return build_report(rich, tmp_path / "out", gallery=2).parent


def test_latex_has_the_best_in_bold_and_references_in_grey(folder: Path) -> None:
    text = (folder / "report.tex").read_text()
    tables = re.findall(r"\\begin\{tabular\}\{l(r+)\}(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert len(tables) == 2 and text.startswith("% \\usepackage{booktabs,xcolor}")
    for columns, body in tables:
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        # \multicolumn{k} stands for k cells.
        widths = {sum(int(n) for n in re.findall(r"\\multicolumn\{(\d+)\}", r)) or len(re.findall(r"(?<!\\)&", r)) for r in rows}
        assert widths == {len(columns)}
        assert re.findall(r"\\(toprule|midrule|bottomrule)", body)[0] == "toprule"
    assert r"\textcolor{gray}{LLaVA-1.5 7B (published)}" in text and r"\textcolor{gray}{58.2}" in text
    assert "58.2}}" not in text  # a published figure is never the best
    assert r"textvqa-val (OCR none)" in text and "$^{*}$" in text and r"100.0$^{\dagger\ddagger}$" in text


def test_latex_compiles(folder: Path, tmp_path: Path) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex on PATH")
    body = (folder / "report.tex").read_text()
    text = "\\documentclass{article}\\usepackage{booktabs,xcolor}\\begin{document}\n" + body + "\\end{document}\n"
    (tmp_path / "all.tex").write_text(text)
    subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"], cwd=tmp_path, check=True)


def test_latex_escapes() -> None:
    assert escape_latex("a_b & 50 % of {x} #1 $y$ ~ ^ \\cmd\nz") == (
        r"a\_b \& 50 \% of \{x\} \#1 \$y\$ \textasciitilde{} \textasciicircum{} \textbackslash{}cmd z"
    )


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


def test_csv_runs_nothing_in_a_spreadsheet(runs: Runs, tmp_path: Path) -> None:
    rows = {"vqav2": [row(1, Path("a.png"), "x", ["x"], {"accuracy": 1.0}, question="q")]}
    out = build_report([runs.eval("a", '=HYPERLINK("http://evil.example")', rows)], tmp_path / "out").parent
    with (out / "report.csv").open(newline="", encoding="utf-8") as file:
        (line,) = csv.DictReader(file)
    assert line["system"] == '\'=HYPERLINK("http://evil.example")'
