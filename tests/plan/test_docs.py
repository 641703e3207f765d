"""docs/plan.md holds what the commands in it print today; REGENERATE=1 writes it anew."""

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


def rows(commands: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The rows of some commands under one head."""
    found: list[str] = []
    for command in commands.splitlines():
        program, *words = shlex.split(command)
        assert program == "mmkit"
        with pytest.raises(SystemExit) as left:
            cli.main(words)
        assert left.value.code == 0, command
        head, rule, row = capsys.readouterr().out.splitlines()
        found += [row] if found else [head, rule, row]
    return "\n".join(found)


def test_the_tables_are_what_the_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("<!-- plan -->") == 7
    made = {match.group(1): rows(match.group(2), capsys) for match in blocks}
    new = BLOCK.sub(lambda match: f"{match.group(1)}\n{made[match.group(1)]}\n", text)
    if os.environ.get("REGENERATE"):
        PAGE.write_text(new, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == new, "run with REGENERATE=1"
