"""The Java programs' calls: what is sent, what is refused, and that nothing hangs. Stand-ins play Java's part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from needs_java import fake_java, needs_java

from mmkit.errors import InputError
from mmkit.eval.score import score
from mmkit.eval.scorers import java, meteor, ptb, spice
from mmkit.eval.scorers.java import java_major, run_java

IMAGES = {"images": [{"id": n} for n in (30, 4)], "annotations": [{"id": n, "image_id": n, "caption": "A dog."} for n in (30, 4)]}
RESULTS = [{"image_id": 30, "caption": "a dog"}, {"image_id": 4, "caption": "a cow"}]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pycocoevalcap of empty jars."""
    root = tmp_path / "pycocoevalcap"
    names = [
        "tokenizer/stanford-corenlp-3.4.1.jar",
        "meteor/meteor-1.5.jar",
        "spice/spice-1.0.jar",
        *map("spice/lib/{}".format, spice._CORENLP),
    ]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    # Not where another test has imported the real one.
    monkeypatch.delitem(sys.modules, "pycocoevalcap", raising=False)
    return root


def refusal(**settings: str) -> str:
    with pytest.raises(InputError) as caught:
        score("coco-caption", RESULTS, IMAGES, bootstrap=0, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


ASKS = [{"tokenizer": "java"}, {"metrics": "meteor"}, {"metrics": "spice"}]


@pytest.mark.parametrize("asks", ASKS)
def test_no_java_says_what_to_install(package: Path, monkeypatch: pytest.MonkeyPatch, asks: dict[str, str]) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(package))
    text = refusal(**asks)
    assert "no java on the PATH" in text and "mmkit[java]" in text
    assert text.startswith("=".join(next(iter(asks.items()))))


@pytest.mark.parametrize("asks", ASKS)
def test_no_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asks: dict[str, str]) -> None:
    fake_java(tmp_path, monkeypatch, "exit 0")
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    assert "pycocoevalcap is not installed; install a Java runtime" in refusal(**asks)


def test_no_jar_says_so(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java(tmp_path, monkeypatch, "exit 0")
    (package / "meteor/meteor-1.5.jar").unlink()
    assert "has no meteor/meteor-1.5.jar; reinstall it" in refusal(metrics="meteor")


def test_default_metrics_start_no_java(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java(tmp_path, monkeypatch, f"touch {tmp_path}/started; exit 1")
    score("coco-caption", RESULTS, IMAGES, bootstrap=0)
    assert not (tmp_path / "started").exists()
    refusal(metrics="meteor")
    assert (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("script", "part"),
    [
        ("echo Error: could not find jar >&2; exit 1", "Java failed with exit code 1: Error: could not find jar"),
        ("echo 'Exception in thread \"main\" Bad' >&2; echo '  at x.y' >&2; exit 3", 'code 3: Exception in thread "main" Bad'),
        ("kill -9 $$", "exit code -9: no message"),
        ("cat > /dev/null; echo 1 2 3", "METEOR gave 1 lines for 2 images"),
        ("while read x; do echo 0,5 0,1; done", "METEOR answered '0,5 0,1', not 23 numbers"),
        ("while read x; do echo 1 2 3; done", "not 23 numbers"),
        ("exit 0", "METEOR gave 0 lines"),
    ],
)
def test_meteor_that_fails_is_one_line(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, part: str
) -> None:
    fake_java(tmp_path, monkeypatch, script)
    assert part in refusal(metrics="meteor")


def test_meteor_is_sent_one_line_an_image(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = " ".join(["1"] * meteor.COLUMNS)
    fake_java(
        tmp_path, monkeypatch, f'echo "$@" > {tmp_path}/arguments; tee {tmp_path}/sent | while read x; do echo {answer}; done'
    )
    rows = meteor.meteor_statistics(["a  |||dog\r\nruns", ""], [["one\u2028two", "x ||| y"], ["é \ud800"]])
    assert rows.shape == (2, 23)
    sent = (tmp_path / "sent").read_text(encoding="utf-8")
    assert sent == "SCORE ||| one two ||| x y ||| a dog runs\nSCORE ||| é ? ||| \n"
    assert "-Duser.language=en" in (tmp_path / "arguments").read_text()


def test_much_noise_on_both_outputs_blocks_nothing(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = " ".join(["1"] * meteor.COLUMNS)
    fake_java(tmp_path, monkeypatch, f"head -c 3000000 /dev/zero >&2; while read x; do echo {answer}; done")
    count = 4000
    assert len(meteor.meteor_statistics(["a dog"] * count, [["a dog " * 30]] * count)) == count


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_java_that_hangs_is_killed_with_its_children(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java(tmp_path, monkeypatch, f"sleep 300 & echo $! > {tmp_path}/child; sleep 300")
    monkeypatch.setattr(meteor, "_START_SECONDS", 1.0)
    began = time.monotonic()
    assert "Java did not end within 1.2 s" in refusal(metrics="meteor")
    assert time.monotonic() - began < 30
    child = int((tmp_path / "child").read_text())
    # The kernel takes a moment.
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.05)
    assert not alive(child)


def test_interpreter_ends_after_a_fault(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Upstream's wrapper waits for its own lock at exit, for ever.
    fake_java(tmp_path, monkeypatch, "read x; exec sleep 300")
    code = "from mmkit.eval.scorers import meteor; meteor._START_SECONDS = 0.5; meteor.meteor_statistics(['a'], [['a']])"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), str(Path.cwd())]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1
    assert b"did not end within" in done.stderr


def test_a_java_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java(tmp_path, monkeypatch, "").write_text("no program")
    with pytest.raises(InputError, match=r"cannot run .*java: "):
        run_java([], where="here", seconds=5)


@pytest.mark.parametrize(
    ("told", "major"),
    [('java version "1.8.0_292"', 8), ('openjdk version "17.0.15" 2025-04-15', 17), ('openjdk version "21"', 21)],
)
def test_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, major: int) -> None:
    fake_java(tmp_path, monkeypatch, f"echo '{told}' >&2")
    assert java_major("here") == major


def test_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java(tmp_path, monkeypatch, "echo hello")
    with pytest.raises(InputError, match="names no version"):
        java_major("here")


def test_java_home_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = fake_java(tmp_path, monkeypatch, "exit 0")
    assert java.java_program("here") == str(program)
    # A wrong JAVA_HOME does not hide a java that is there.
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setenv("PATH", str(program.parent))
    assert java.java_program("here") == str(program)


def test_tokeniser_that_loses_a_line(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java(tmp_path, monkeypatch, "echo one line only")
    with pytest.raises(InputError, match="Java gave 1 lines for 2 captions; use tokenizer=python"):
        ptb.tokenise_java(["a dog", "a cat"])
    assert ptb.tokenise_java([]) == []


@needs_java
def test_tokeniser_needs_no_writable_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(java.tempfile, "tempdir", str(tmp_path))
    assert ptb.tokenise_java(["A dog's bowl."]) == ["a dog 's bowl"]
    assert list(tmp_path.iterdir()) == []


# A stand-in for SPICE: it answers in descending order of ids, with what the test put into answers.json.
SPICE = """case "$1" in -version) echo 'openjdk version "{version}"' >&2; exit 0;; esac
echo "$@" > {folder}/arguments
while [ "$1" != "-out" ]; do case "$1" in *in.json) cp "$1" {folder}/in.json;; esac; shift; done
cp {folder}/answers.json "$2"
"""


def spice_stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, answers: object, version: str = "17.0.1") -> None:
    text = answers if isinstance(answers, str) else json.dumps(answers)
    (folder / "answers.json").write_text(text)
    fake_java(folder, monkeypatch, SPICE.format(folder=folder, version=version))
    monkeypatch.setenv("MMKIT_CACHE", str(folder / "cache"))
    monkeypatch.delenv("MMKIT_CORENLP", raising=False)


def row(image: int, f: object) -> dict[str, object]:
    return {"image_id": image, "scores": {"All": {"pr": 1.0, "re": 1.0, "f": f}, "Color": {"f": None}}}


def test_spice_results_are_matched_by_id(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spice_stand_in(tmp_path, monkeypatch, [row(30, 0.25), row(4, 0.5)])
    result = score("coco-caption", RESULTS, IMAGES, metrics="spice,cider", bootstrap=20)
    assert list(result["metrics"]) == ["CIDEr", "SPICE"]
    assert [(r["id"], r["SPICE"]) for r in result["per_sample"]] == [(4, 0.5), (30, 0.25)]
    assert result["metrics"]["SPICE"] == 0.375
    assert "notes" not in result["settings"]
    asked = json.loads((tmp_path / "in.json").read_text())
    assert asked == [{"image_id": 4, "test": "a cow", "refs": ["a dog"]}, {"image_id": 30, "test": "a dog", "refs": ["a dog"]}]
    arguments = (tmp_path / "arguments").read_text()
    # Cache in mmkit's own folder, flags of Java 16 and later, and CoreNLP on the path.
    assert f"-cache {tmp_path}/cache/spice " in arguments
    assert "--add-opens=java.base/java.lang=ALL-UNNAMED" in arguments
    assert spice._CORENLP[1] in arguments


def test_spice_without_a_number_is_counted_and_left_out(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spice_stand_in(
        tmp_path, monkeypatch, '[{"image_id": 4, "scores": {"All": {"f": NaN}}}, {"image_id": 30, "scores": {"All": {"f": 0.5}}}]'
    )
    result = score("coco-caption", RESULTS, IMAGES, metrics="spice", bootstrap=50)
    assert result["metrics"] == {"SPICE": 0.5}
    assert result["settings"]["notes"] == ["SPICE has no value for 1 of 2 images; its mean is over the others"]
    assert result["per_sample"] == [{"id": 4}, {"id": 30, "SPICE": 0.5}]
    json.dumps(result, allow_nan=False)
    spice_stand_in(tmp_path, monkeypatch, [row(4, None), row(30, None)])
    assert "SPICE has no value for any image" in refusal(metrics="spice")


@pytest.mark.parametrize(
    ("answers", "part"),
    [
        ("", "of another form"),
        ("[{", "of another form"),
        ({"a": 1}, "of another form"),
        ([{"image_id": 4}], "of another form"),
        ([row(4, "x"), row(30, 1)], "of another form"),
        ([row(4, 0.5)], "1 results, which are not those of the 2 images"),
        ([row(4, 0.5), row(5, 0.5)], "not those of the 2 images"),
        ([row(4, 0.5), row(30, 0.5), row(30, 0.5)], "3 results"),
    ],
)
def test_wrong_spice_results(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: object, part: str) -> None:
    spice_stand_in(tmp_path, monkeypatch, answers)
    assert part in refusal(metrics="spice")


def test_spice_that_writes_nothing(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spice_stand_in(tmp_path, monkeypatch, [])
    fake_java(tmp_path, monkeypatch, "echo 'openjdk version \"11.0.2\"' >&2")
    assert "SPICE wrote no results" in refusal(metrics="spice")


def test_java_8_gets_no_flags_it_does_not_know(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spice_stand_in(tmp_path, monkeypatch, [row(4, 0.5), row(30, 0.5)], version="1.8.0_292")
    score("coco-caption", RESULTS, IMAGES, metrics="spice", bootstrap=0)
    assert "--add-opens" not in (tmp_path / "arguments").read_text()


def test_corenlp_is_looked_for_and_named(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spice_stand_in(tmp_path, monkeypatch, [row(4, 0.5), row(30, 0.5)])
    for name in spice._CORENLP:
        (package / "spice/lib" / name).unlink()
    text = refusal(metrics="spice")
    assert f"not in {tmp_path}/cache/corenlp-3.6.0" in text and "stanford-corenlp-full-2015-12-09.zip" in text
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setenv("MMKIT_CORENLP", str(elsewhere))
    assert f"not in {elsewhere}" in refusal(metrics="spice")
    elsewhere.mkdir()
    for name in spice._CORENLP:
        (elsewhere / name).touch()
    score("coco-caption", RESULTS, IMAGES, metrics="spice", bootstrap=0)
    assert f"{elsewhere}/{spice._CORENLP[0]}" in (tmp_path / "arguments").read_text()


def test_meteor_formula_by_hand() -> None:
    # "a couch" against "a sofa": a function word exact, a content word by synonym, whole and in one chunk.
    row_ = np.zeros(23)
    row_[[0, 1, 2, 3, 6, 7, 12, 13, 21, 22]] = [2, 2, 1, 1, 1, 1, 1, 1, 2, 2]
    assert meteor.meteor_from_statistics(row_) == pytest.approx(0.85, abs=1e-12)
    row_[20] = 1
    assert meteor.meteor_from_statistics(row_) == pytest.approx((1 - 0.6 * 0.5**0.2) * 0.85, abs=1e-12)
    assert meteor.meteor_from_statistics(np.zeros((3, 23))).tolist() == [0, 0, 0]
