"""``mmkit report`` as it is typed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
from report_runs import Runs, lmms_results, many

import mmkit.cli
from mmkit.eval.report.render import GALLERY, THUMBNAIL


def report(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Exit code, and what was said on either stream."""
    with pytest.raises(SystemExit) as left:
        mmkit.cli.main(["report", *map(str, words)])
    captured = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, captured.out + captured.err


def gallery_of(page: Path) -> dict[str, list[list[object]]]:
    (text,) = re.findall(r'id="gallery-data">(.*?)</script>', page.read_text(encoding="utf-8"))
    return json.loads(text)


def test_options_reach_the_page(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = many(runs, pictures=6, questions=2, systems=1)
    words = [*paths, "--out", tmp_path / "out", "--title", "Mine", "--gallery", 4, "--thumbnail", 64]
    assert report(capsys, *words) == (0, f"report: {tmp_path / 'out' / 'report.html'}\n")
    data = gallery_of(tmp_path / "out" / "report.html")
    assert len(data["pictures"]) == 4 and {p[1] for p in data["pictures"]} == {64} and len(data["samples"]) == 8
    assert "<h1>Mine</h1>" in (tmp_path / "out" / "report.html").read_text()


def test_defaults_are_those_of_the_function() -> None:
    options = {p.name: p.default for p in typer.main.get_command(mmkit.cli.app).commands["report"].params}
    assert (options["gallery"], options["thumbnail"]) == (GALLERY, THUMBNAIL)


def test_runs_and_results_of_lmms_eval_in_one_report(
    world: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = lmms_results(tmp_path / "lmms", {"gqa": {"results": {"exact_match,none": 0.61}, "n": (12578, 12578)}})
    assert report(capsys, *world, results, "--out", tmp_path / "out")[0] == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "llava-hf/llava-1.5-7b-hf (lmms-eval)" in text and "gqa-testdev-balanced" in text and "61.0" in text


def test_wrong_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("{}")
    code, said = report(capsys, tmp_path / "other.json", "--out", tmp_path / "out")
    assert code == 2 and said.count("\n") == 1 and "other.json: not a result file of lmms-eval" in said
    assert report(capsys, tmp_path, "--out", tmp_path / "out", "--gallery", -1)[0] == 2
