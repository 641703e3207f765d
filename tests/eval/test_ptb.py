"""The Python PTB tokeniser against the Java one's recorded output, and its manners on odd text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit.errors import InputError
from mmkit.eval.scorers import ptb

LINE_ENDS = ["\r", "\n", "\r\n", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"]


def one(caption: str) -> str:
    return " ".join(ptb.ptb_tokens(caption))


def test_all_recorded_coco_captions(shared: Path) -> None:
    captions = json.loads((shared / "scoring/coco_human_ptb.json").read_text())["captions"]
    assert len(captions) == 395
    assert [row["raw"] for row in captions if one(row["raw"]) != row["tokenised"]] == []


def test_all_recorded_cases(shared: Path) -> None:
    cases = json.loads((shared / "scoring/ptb_cases_a.json").read_text())["cases"]
    assert len(cases) == 17
    assert [case["raw"] for case in cases if one(case["raw"]) != case["tokenised"]] == []


def test_tokenised_text_stays(shared: Path) -> None:
    rows = json.loads((shared / "scoring/coco_fakecap_a_annotations.json").read_text())["annotations"]
    assert [row["caption"] for row in rows if one(row["caption"]) != row["caption"]] == []


@pytest.mark.parametrize(
    ("raw", "tokens"),
    [
        ("isn't", "is n't"),
        ("it’s", "it 's"),
        ("don’t", "do n't"),
        ("man's", "man 's"),
        ("wild turkey's around it.", "wild turkey 's around it"),
        ("mother-in-law's", "mother-in-law 's"),
        ("y'all", "y' all"),
        ("rock'n'roll", "rock 'n' roll"),
        ("hors d'oeuvres", "hors d'oeuvres"),
        ("the dogs' bowl", "the dogs bowl"),
        ("'no peddling' signs", "no peddling signs"),
        ("(a) [b] {c}", "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb-"),
        ("a :) b", "a :-rrb- b"),
        ("what?! oh!! no? yes!", "what ?! oh !! no yes"),
        ("a/b w/o trailing/", "a/b w/o trailing /"),
        ("word- word -word", "word word word"),
        ("12-year-old F-16", "12-year-old f-16"),
        ("22 3/4 inches", "22\u00a03/4 inches"),
        ("5:54pm and 4pm", "5:54 pm and 4pm"),
        ("10x10, 90s, 3D", "10x10 90s 3d"),
        ("$5.00 £5 €5 50% 5¢", "$ 5.00 # 5 $ 5 50 % 5 cents"),
        ("½ cup", "1/2 cup"),
        ("on Furnace St.", "on furnace st."),
        ("Blvd. Ave. Rd.", "blvd. ave. rd."),
        ("a T.V.", "a t.v."),
        ("end with tv.", "end with tv"),
        ("end with K.", "end with k."),
        ("K. went, K. The end", "k. went k the end"),
        ("No. 5 and no.", "no. 5 and no"),
        ("dog.A cat", "dog.a cat"),
        ("the water. One man", "the water one man"),
        ("tea..", "tea"),
        ("wait... what…", "wait what"),
        ("en – and em — dash", "en and em dash"),
        ("R&B AT&T a&b", "r&b at&t a & b"),
        ("&amp; &lt; &quot;x&quot;", "& < x"),
        ("<br/> </s> <image>", "<br/> </s> <image>"),
        ("a@b.com @home http://a.com/x?y=1", "a@b.com @home http://a.com/x?y=1"),
        ("emoji 😀👍🏽 end", "emoji end"),
        ("soft\u00adhyphen zero\u200bwidth", "softhyphen zero width"),
        ("हिन्दी ไทย 北京 café", "हिन्दी ไทย 北京 café"),
        ("cannot gimme Gonna", "can not gim me gon na"),
        ("-LRB- literal", "-lrb- literal"),
        ("", ""),
        (" \t ", ""),
        ("...!", ""),
    ],
)
def test_observed_behaviour(raw: str, tokens: str) -> None:
    assert one(raw) == tokens


@pytest.mark.parametrize("end", LINE_ENDS)
def test_line_ends_are_spaces(end: str) -> None:
    captions = [f"one{end}two", "three"]
    for tokenise in (ptb.tokenise_python, ptb.tokenise_none):
        got = tokenise(captions)
        assert len(got) == 2
        assert got[0].split() == ["one", "two"]
        assert got[1] == "three"


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=80))
def test_any_text(caption: str) -> None:
    tokens = ptb.ptb_tokens(caption)
    assert all(tokens)
    assert not any(token in ptb.REMOVED for token in tokens)
    # Captions are joined and split on plain spaces later: no token may hold one, or a line end.
    assert not any(mark in token for token in tokens for mark in [" ", *LINE_ENDS])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.from_regex(r"[a-z]{2,8}", fullmatch=True), max_size=12))
def test_plain_words_stay(words: list[str]) -> None:
    special = {*ptb._SPLIT, *ptb._ABBREVIATIONS.split()}
    words = [word for word in words if word not in special]
    assert ptb.ptb_tokens(" ".join(words).capitalize() + ".") == words


@settings(max_examples=30, deadline=None)
@given(st.sampled_from("a1.-'/:,&<([\\@_!?\u00a0"), st.integers(1000, 3000))
def test_repeated_marks_take_no_quadratic_time(mark: str, count: int) -> None:
    ptb.ptb_tokens(mark * count)


def test_lone_surrogate_does_not_crash() -> None:
    assert one("a dog \ud83d on a table") == "a dog on a table"


def test_java_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptb.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"no java on the PATH.*tokenizer=python"):
        ptb.tokenise_java(["a dog"])


def test_jar_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptb.shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(ptb, "java_jar", lambda: None)
    with pytest.raises(InputError, match=r"pycocoevalcap is not installed.*mmkit\[java\]"):
        ptb.tokenise_java(["a dog"])


def test_java_that_fails_is_an_input_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "java"
    program.write_text("#!/bin/sh\necho one line only\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(ptb.shutil, "which", lambda name: str(program))
    monkeypatch.setattr(ptb, "java_jar", lambda: tmp_path / "x.jar")
    with pytest.raises(InputError, match=r"1 lines for 2 captions \(exit code 3\)"):
        ptb.tokenise_java(["a dog", "a cat"])
    assert ptb.tokenise_java([]) == []


@pytest.mark.skipif(shutil.which("java") is None or ptb.java_jar() is None, reason="needs java and mmkit[java]")
def test_java_and_python_agree(shared: Path) -> None:
    rows = json.loads((shared / "scoring/coco_human_ptb.json").read_text())["captions"]
    raw = [row["raw"] for row in rows]
    assert ptb.tokenise_java(raw) == ptb.tokenise_python(raw)
    assert ptb.tokenise_java(["one\rtwo", "three\u2028x", "four"]) == ["one two", "three x", "four"]
