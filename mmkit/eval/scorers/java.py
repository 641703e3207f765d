"""Running the Java programs that pycocoevalcap brings (PTB tokeniser, METEOR, SPICE), each as one call that ends.

The upstream wrappers talk to a living process under a lock, never read its error output, and hang at exit after any fault.
Here a program gets all its input at once, both its outputs are read while it runs, and it is killed when its time is up or
this process leaves the call in any other way.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mmkit.errors import InputError

# A fixed locale: decimal commas break METEOR's own protocol, and Turkish lower case would change tokens. UTF-8 for its input.
FLAGS = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8")
INSTALL = "install a Java runtime (Debian: default-jre-headless) and mmkit[java]"
# All of COCO's validation captions take about a second; a virtual machine that hangs must not hold an evaluation.
_TOKENISER_SECONDS = 600
# Of the error output in a message, which is one line.
_SHOWN = 200


def java_program(where: str) -> str:
    """Path of ``java``: below ``$JAVA_HOME`` where that is set, else on the PATH.

    Args:
        where: What asks for it, for the message.

    Raises:
        InputError: There is none.
    """
    home = os.environ.get("JAVA_HOME")
    found = shutil.which("java", path=str(Path(home) / "bin")) if home else None
    found = found or shutil.which("java")
    if found is None:
        raise InputError("no java on the PATH", where=where, mend=INSTALL)
    return found


def package_file(name: str, where: str) -> Path:
    """A file of the pycocoevalcap package, found without importing it.

    Args:
        name: Path inside the package; the last part may hold a ``*``.
        where: What asks for it, for the message.

    Raises:
        InputError: The package or the file is missing.
    """
    spec = importlib.util.find_spec("pycocoevalcap")
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise InputError("pycocoevalcap is not installed", where=where, mend=INSTALL)
    found = sorted(path for folder in folders for path in Path(folder).glob(name))
    if not found:
        what = f"pycocoevalcap in {folders[0]} has no {name}"
        raise InputError(what, where=where, mend="reinstall it: pip install --force-reinstall pycocoevalcap")
    return found[-1]


def run_java(arguments: Sequence[str], *, where: str, seconds: float, text: str = "", folder: Path | None = None) -> str:
    """Run Java to its end.

    Args:
        arguments: What follows ``java`` and the flags of the locale.
        where: What asks for it, for messages.
        seconds: Time limit, after which it and its children are killed.
        text: Its standard input.
        folder: Where it runs.

    Returns:
        Its standard output.

    Raises:
        InputError: Java is missing, does not start, fails or does not end in time.
    """
    command = [java_program(where), *FLAGS, *arguments]
    pipe = subprocess.PIPE
    try:
        # A session of its own, so that a wrapper script's children die with it.
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=folder, start_new_session=True)
    except OSError as error:
        raise InputError(f"cannot run {command[0]}: {error.strerror}", where=where, mend=INSTALL) from None
    try:
        # Reads both outputs while it writes: no full pipe can stop either side. Lone surrogates have no UTF-8.
        out, complaints = process.communicate(text.encode("utf-8", errors="replace"), timeout=seconds)
    except subprocess.TimeoutExpired:
        mend = "try again on a less busy machine, or leave this metric or tokenizer out"
        raise InputError(f"Java did not end within {seconds:g} s", where=where, mend=mend) from None
    finally:
        # However this call is left, by Ctrl-C too.
        _kill(process)
    if process.returncode:
        what = f"Java failed with exit code {process.returncode}: {_last_line(complaints)}"
        raise InputError(what, where=where, mend="see the Java message; Java 17 is what it is tested with")
    return out.decode("utf-8", errors="replace")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a program and what it started, and close its pipes; nothing where it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _last_line(complaints: bytes) -> str:
    """The line of Java's error output that says most: the exception, not the frames below it."""
    lines = [line.strip() for line in complaints.decode("utf-8", errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if "Exception" in line or "Error" in line]
    chosen = (named or lines or ["no message"])[0 if named else -1]
    return chosen[:_SHOWN]


def java_major(where: str) -> int:
    """Major version of the Java runtime: 8, 11, 17 ...

    Raises:
        InputError: Java is missing, or does not tell its version.
    """
    java = java_program(where)
    try:
        done = subprocess.run([java, "-version"], capture_output=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        raise InputError(f"{java} -version does not run", where=where, mend=INSTALL) from None
    # "1.8.0_292" until Java 8, "17.0.15" since.
    found = re.search(rb'version "(?:1\.)?(\d+)', done.stderr + done.stdout)
    if not found:
        raise InputError(f"{java} -version names no version", where=where, mend=INSTALL)
    return int(found[1])


_TOKENISER = "tokenizer=java"
_TOKENISER_JAR = "tokenizer/stanford-corenlp-*.jar"


def check_tokeniser() -> None:
    """Refuse ``tokenizer=java`` where it cannot run.

    Raises:
        InputError: Java or the jar is missing.
    """
    java_program(_TOKENISER)
    package_file(_TOKENISER_JAR, _TOKENISER)


def tokenise_lines(captions: Sequence[str]) -> list[str]:
    """The Stanford tokeniser's output for each caption, as coco-caption calls it.

    Args:
        captions: Captions without line ends.

    Returns:
        Lower-case tokens of each caption, punctuation included, joined by single spaces.

    Raises:
        InputError: Java or the jar is missing, or the tokeniser failed.
    """
    where = _TOKENISER
    jar = package_file(_TOKENISER_JAR, where)
    # The system's folder for temporary files: the official code writes into site-packages, which may be read-only.
    with tempfile.TemporaryDirectory(prefix="mmkit-ptb-") as folder:
        path = Path(folder) / "captions.txt"
        path.write_bytes("".join(f"{caption}\n" for caption in captions).encode("utf-8", errors="replace"))
        arguments = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", str(path)]
        out = run_java(arguments, where=where, seconds=_TOKENISER_SECONDS).split("\n")[:-1]
    # Fewer or more lines than captions would pair texts with the wrong images.
    if len(out) != len(captions):
        raise InputError(f"Java gave {len(out)} lines for {len(captions)} captions", where=where, mend="use tokenizer=python")
    return out
