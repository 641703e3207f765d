"""docs/plan.md holds what the commands in it print today.

Usually the first row of every table is made again, which takes a minute; ALL=1 makes all of them, REGENERATE=1 writes them anew.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from mmkit import cli

PAGE = Path(__file__).resolve().parents[2] / "docs" / "plan.md"
# A mark, a block of commands, and the table that they give (none yet where the page is new).
BLOCK = re.compile(r"(<!-- plan -->\n```bash\n(.*?)```\n)(\n\|.*?\n(?=\n|$))?", re.S)
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _own_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATA", "RUNS", "MMKIT_DEMO"):
        monkeypatch.delenv(name, raising=False)


def printed(command: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Head, rule and row of a command."""
    program, *words = shlex.split(command)
    assert program == "mmkit"
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert left.value.code == 0, command
    return capsys.readouterr().out.splitlines()


def test_the_tables_are_what_the_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("<!-- plan -->") == 7
    renew = bool(os.environ.get("REGENERATE"))
    for match in blocks:
        commands = match.group(2).splitlines()
        table = (match.group(3) or "").strip().splitlines()
        assert renew or len(table) == 2 + len(commands)
        for place, command in enumerate(commands if renew or os.environ.get("ALL") else commands[:1]):
            head, rule, row = printed(command, capsys)
            if renew:
                table = [head, rule, *table[2 : 2 + place], row] if place else [head, rule, row]
            assert table[:2] == [head, rule] and table[2 + place] == row, f"run with REGENERATE=1: {command}"
        text = text.replace(match.group(0), f"{match.group(1)}\n" + "\n".join(table) + "\n")
    if renew:
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == text
