"""The mark of tests that run pycocoevalcap's jars, and programs that stand in for Java."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

needs_java = pytest.mark.skipif(
    shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None,
    reason="needs a Java runtime and pycocoevalcap (pip install mmkit[java])",
)


def fake_java(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Put a shell script in Java's place, the first on the PATH."""
    program = folder / "bin" / "java"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    # JAVA_HOME wins over the PATH.
    monkeypatch.setenv("JAVA_HOME", str(folder))
    return program
