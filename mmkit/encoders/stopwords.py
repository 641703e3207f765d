"""Words that say nothing about a picture, for the ablation without them (arXiv 2411.03313, Table 7)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmkit.encoders.vocab import Vocabulary
from mmkit.errors import InputError

# Articles, pronouns, prepositions, conjunctions, auxiliaries and the like. Words of place and number that a picture can show
# (above, under, two) stay labels. The endings that contractions leave (it's -> s) are among them.
_ENGLISH = """
    a about after again all also am an and any are as at be because been before being both but by can could d did do does doing
    done for from get gets getting got had has have having he her here hers herself him himself his how however i if in into is
    it its itself just ll m may me might mine more most must my myself no nor not now of off on once only or other our ours
    ourselves out own re s same shall she should so some such t than that the their theirs them themselves then there these they
    this those though through to too until up upon us ve very was we were what when where whether which while who whom whose why
    will with within without would yet you your yours yourself yourselves
"""
ENGLISH = tuple(_ENGLISH.split())


def read_stop_words(choice: str | Sequence[str]) -> tuple[str, ...]:
    """The words a choice means.

    Args:
        choice: ``english``; a file with a word a line (empty lines and lines that start with ``#`` do not count); or the words.

    Returns:
        Lower-case words.

    Raises:
        InputError: If there is no such file, or it holds no words, or a line holds several.
    """
    if not isinstance(choice, str):
        return tuple(word.lower() for word in choice)
    if choice == "english":
        return ENGLISH
    path = Path(choice)
    try:
        # A byte order mark, as some editors write it, would become part of the first word.
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        what = "no such list of stop words" if not path.exists() else f"cannot be read ({error})"
        raise InputError(what, where=f"stop_words {choice}", mend="use english, or a UTF-8 file with a word a line") from error
    words = []
    for number, line in enumerate(lines, start=1):
        word = line.strip().lower()
        # A stop word is compared with single tokens: two words in a line would never match, in silence.
        if len(word.split()) > 1 and not word.startswith("#"):
            raise InputError(f"{word!r} is more than a word", where=f"{path}:{number}", mend="write a word a line")
        if word and not word.startswith("#"):
            words.append(word)
    if not words:
        raise InputError("no stop words in this file", where=path, mend="write a word a line, or leave stop_words out")
    return tuple(words)


def stop_labels(words: Sequence[str], vocabulary: Vocabulary) -> frozenset[int]:
    """Ids that are stop words as whole words; pieces of other words stay labels.

    Args:
        words: Lower-case stop words.
        vocabulary: The labels.

    Returns:
        The ids.
    """
    found = set()
    for word in words:
        # Vocabularies with case know a word twice, byte-level ones also with the space before it.
        for text in (word, word.capitalize(), f" {word}", f" {word.capitalize()}"):
            ids = vocabulary.encode(text)
            # The second condition keeps a shared "unknown" token.
            if len(ids) == 1 and vocabulary.word(ids[0]).lower() == word:
                found.add(ids[0])
    return frozenset(found)
