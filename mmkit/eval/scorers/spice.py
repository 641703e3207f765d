"""SPICE 1.0 (Anderson et al. 2016): F1 over scene-graph tuples, by its own jar.

The jar needs Stanford CoreNLP 3.6.0 (385 MB), which no package brings; mmkit never downloads it. What is here besides is the
traps mended: results are matched by id and not by order, the cache lies outside site-packages, and a parse that gives no
number is counted and not spread over the whole score.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmkit.data.remote import default_cache
from mmkit.errors import InputError
from mmkit.eval.scorers.java import java_major, java_program, package_file, run_java

_WHERE = "metrics=spice"
_CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_SOURCE = "https://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"
# A hang must end; a new caption takes some tenths of a second on a slow core, after the models are loaded.
_START_SECONDS, _CAPTION_SECONDS = 600.0, 0.5
# The cache's serialiser looks into these packages, which Java 16 and later close.
_OPENED = ("java.lang", "java.util", "java.math", "java.net", "java.text", "java.util.concurrent")


def check_spice() -> None:
    """Refuse SPICE where it cannot run.

    Raises:
        InputError: Java, a jar or CoreNLP is missing.
    """
    java_program(_WHERE)
    _class_path()


def spice_scores(ids: Sequence[int], hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Score each image.

    Args:
        ids: N image ids.
        hypotheses: One tokenised caption for each.
        references: For each image at least one tokenised reference.

    Returns:
        F1 of each image in the order of ``ids``; NaN where SPICE found no tuple to count.

    Raises:
        InputError: Java, a jar or CoreNLP is missing, SPICE fails or hangs, or its results are about other ids.
    """
    class_path = _class_path()
    # Java 8 knows no such option.
    opened = [f"--add-opens=java.base/{name}=ALL-UNNAMED" for name in _OPENED] if java_major(_WHERE) >= 16 else []
    # Parses are kept: a second score against the same references takes a fraction of the time.
    cache = default_cache() / "spice"
    cache.mkdir(parents=True, exist_ok=True)
    rows = [{"image_id": i, "test": h, "refs": list(r)} for i, h, r in zip(ids, hypotheses, references, strict=True)]
    seconds = _START_SECONDS + _CAPTION_SECONDS * sum(1 + len(captions) for captions in references)
    with tempfile.TemporaryDirectory(prefix="mmkit-spice-") as name:
        asked, answered = Path(name) / "in.json", Path(name) / "out.json"
        asked.write_text(json.dumps(rows), encoding="utf-8")
        options = [str(asked), "-cache", str(cache), "-out", str(answered), "-subset", "-silent"]
        command = [*opened, "-Xmx8G", "-cp", class_path, "edu.anu.spice.SpiceScorer", *options]
        # In the temporary folder: nothing that it may write lands in the user's.
        run_java(command, where=_WHERE, seconds=seconds, folder=Path(name))
        return read_spice(answered, ids)


def read_spice(path: Path, ids: Sequence[int]) -> list[float]:
    """Read SPICE's result file.

    Args:
        path: ``[{"image_id", "scores": {"All": {"f"}, ...}}]``, in any order.
        ids: Ids that were asked for.

    Returns:
        F1 of each id, in the order of ``ids``; NaN where the file has none (``null`` or ``NaN``).

    Raises:
        InputError: No such file, not of this form, or about other ids.
    """
    mend = "leave spice out of metrics=, or run again"
    try:
        rows: Any = json.loads(path.read_text(encoding="utf-8"))
        found = {row["image_id"]: _number(row["scores"]["All"]["f"]) for row in rows}
    except OSError:
        raise InputError("SPICE wrote no results", where=_WHERE, mend=mend) from None
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"SPICE's results are of another form: {error!r:.80}", where=_WHERE, mend=mend) from None
    if len(rows) != len(ids) or found.keys() != set(ids):
        what = f"SPICE gave {len(rows)} results, which are not those of the {len(ids)} images"
        raise InputError(what, where=_WHERE, mend=mend)
    # By id: SPICE sorts them, and upstream pairs that order with the order of insertion.
    return [found[key] for key in ids]


def _number(value: object) -> float:
    """A score; NaN for ``null``, which is how some versions write it."""
    return math.nan if value is None else float(str(value))


def _class_path() -> str:
    """The jars of SPICE, its libraries and CoreNLP."""
    jar = package_file("spice/spice-1.0.jar", _WHERE)
    own, named = default_cache() / "corenlp-3.6.0", os.environ.get("MMKIT_CORENLP")
    # Upstream's place is the last: whoever has it from there need not copy 385 MB.
    for folder in [Path(named)] if named else [own, jar.parent / "lib"]:
        if all((folder / name).is_file() for name in _CORENLP):
            return os.pathsep.join([str(jar), str(jar.parent / "lib" / "*"), *(str(folder / name) for name in _CORENLP)])
    what = f"SPICE needs {' and '.join(_CORENLP)}, which are not in {named or own}"
    raise InputError(what, where=_WHERE, mend=f"unpack them there from {_SOURCE} (385 MB), or name their folder in MMKIT_CORENLP")
