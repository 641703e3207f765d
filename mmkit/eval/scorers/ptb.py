"""Caption tokenisers: a Python twin of the Penn Treebank tokeniser that COCO scores are made with, Java's own, or none.

The twin is written from the observed input and output of the Stanford tokeniser (CoreNLP 3.4.1, ``-preserveLines
-lowerCase``) followed by pycocoevalcap's removal of punctuation; none of its code was used. Both are compared on real
captions, on 55,000 words before a period and on random captions full of odd text; what differs is in letters with accents
glued to a mark or a number, soft hyphens, and addresses glued to other signs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from mmkit.eval.scorers.java import tokenise_lines

# pycocoevalcap's list, exactly: "?!" and ":-rrb-" are not on it and so count as words.
_REMOVED = "'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;"
REMOVED = frozenset(_REMOVED.split())
# A line end inside a caption would become a line of its own in the Java tokeniser's output, and shift all that follow.
_LINE_ENDS = re.compile("[\r\n\x0b\x0c\x85\u2028\u2029]")

# Separators that are no white space to Python, and marks that vanish without splitting the word around them.
_CHARACTERS = {
    **dict.fromkeys([0x200B, 0x200C, 0x200D, 0x200E, 0x200F, 0x2060, 0xFEFF], " "),
    0xAD: None,
    0xA3: " # ",
    0x20AC: " $ ",
    0xA4: " $ ",
    0x20A0: " $ ",
    0xA2: " cents ",
}
# Spaces around the angles: written as entities they never make a tag.
_ENTITIES = {"&amp;": "&", "&lt;": " < ", "&gt;": " > ", "&nbsp;": " ", "&mdash;": " -- ", "&ndash;": " -- "}
# In any case of letters; the two quotes in lower case alone.
_QUOTES = {"&quot;": '"', "&apos;": "'"}
_ENTITY = re.compile(f"(?i:{'|'.join(_ENTITIES)})|{'|'.join(_QUOTES)}")

# Titles, streets, firms, months, days and American states that own their period. The end of the caption does not
# matter: there the Java tokeniser writes the period twice, and the second one is removed.
_ABBREVIATIONS = """mr mrs ms drs dr messrs mlle mme msgr mt prof profs rev reps rep gen gov sens sen sgt sfc spc lt maj capt
cmdr col cpl adm ens atty det pvt pfc pres supt insp hon esq alex jos wm ste st ft ave blvd rd bldg ct rt sq dept inc ltd plc
corp co cie cos bhd bros assn assoc asst elec intl sys univ natl jr sr est tel ext vs cf al etc adj adv seq ph jan feb mar
apr jun jul aug sept sep oct nov dec mon tues tue wed thurs thu fri fla va vt ind ga md tenn penn conn mich minn mo mont neb
nev okla kan kans ky ala ariz colo dak calif wis wyo"""
# Those that are words, too, count with a capital letter only: "Noah's ark." ends a sentence. A few have no form in capitals.
_CAPITALISED = "ark az del ill la mass miss ore pa tex wash"
_CASED = "[Mm]fg|[Mm]tg|[Pp]t[ey]"
_KNOWN = "|".join(
    [
        f"(?i:{'|'.join(_ABBREVIATIONS.split())})",
        *(f"{word[0].upper()}(?i:{word[1:]})" for word in _CAPITALISED.split()),
        _CASED,
    ]
)
# "no. 5" is one word and a number, "he said no." ends a sentence.
_BEFORE_NUMBERS = "nos no figs fig pp ca art op prop"

# Letters and digits of any script, with combining marks, but no symbols, no emoji and nothing outside the first plane.
_NO_LETTER = "\\s\\x00-\\x2f:-@\\[-`{-\\x9f\\xa0-\\xa9\\xab-\\xb4\\xb6-\\xb9\\xbb-\\xbf×÷"
_NO_LETTER += "\u2000-\u2070\u2072-\u207e\u2080-\u208f\u209d-\u20cf\u2100-\u2bff\u3000-\u303f\ud800-\uf8ff"
_NO_LETTER += "\ufe00-\ufe0f\ufe30-\ufe6f\uff00-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uffff"
# Signs that vanish: odd hyphens and marks, most currencies, Roman numerals, emoji and whatever lies outside the first plane.
_VANISHES = (
    r"\U00010000-\U0010ffff\x00-\x1f\x7f‐‑‒\u201b\u2024\u2025\u2027\u202a-\u202e\u203c\u203d\u2043\u2045-\u205f\u2072\u2073"
)
_VANISHES += r"\u208f\u209d-\u209f\u20a1-\u20a3\u20a5-\u20ab\u20ad-\u20cf\u2150-\u2152\u215f-\u2182\u2185-\u218f"
_VANISHES += r"\ufe00-\ufe0f「」\ud800-\udfff"
_X = f"[^{_NO_LETTER}\U00010000-\U0010ffff]"  # letter or digit
_L = f"[^{_NO_LETTER}0-9\U00010000-\U0010ffff]"  # letter
_APOSTROPHE = "['’]"
_ACRONYM = r"(?:[A-Za-z]\.)+[A-Za-z]\."
# What a compound may begin with ("U.S.-made", "1,000-foot", "setup.py-based"), and what may follow a hyphen in it.
_HEAD = rf"(?:(?:[A-Za-z]\.)+[A-Za-z]\.?(?=[-‐‑'’])|{_X}+(?:[.,]{_X}+)*(?=[-‐‑])|{_X}+(?=_))"
_PART = rf"(?:{_ACRONYM}(?={_X}|[-/'’]|\s|$)|{_X}+)"
# Between slashes no digit comes after a hyphen, there are two hyphens at most, and two slashes in all.
_BETWEEN_SLASHES = rf"{_X}+(?:[-‐‑]{_L}+){{0,2}}"

# After a single letter these words begin a sentence, so the period is a full stop and goes (found by trial).
_STARTERS = """A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Mr. Ms. Now
Once One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You"""
_STARTERS_ANY = "|".join(re.escape(word) for word in (_STARTERS + " " + _STARTERS.upper()).split())
_TAG = r"</?[A-Za-z!?][^<>\n]*>"
_STARTER = rf"\s+(?:(?:{_STARTERS_ANY})(?=\s|$)|{_TAG})"

_FILES = "jpe?g|png|gif|bmp|pdf|doc|txt|html?|xml|zip|gz|tar|mp3|mov|exe|py|c|h|cpp|java|php|bat|dll"

_PATTERNS = (
    # A plain word, first for speed: nine tokens of ten.
    r"[A-Za-z]{2,}(?=\s|$)",
    # Addresses, tags and faces, before their parts can match.
    r"(?i:https?)://[^\s<>\"()]*[^\s<>\"().,;:!?’{}-]",
    r"[A-Za-z0-9][^\s@\"<>|(){}]*@+[^\s\"<>|(){}.]+(?:\.[^\s\"<>|(){}.]+)*|@[A-Za-z_]\w*",
    r"(?<!-)(?:[A-Za-z0-9]+\.)+(?:com|net|org|edu)\b(?:/[^\s<>\"()]*[^\s<>\"().,;:!?’-])?",
    rf"(?!{_ACRONYM})[A-Za-z0-9]+(?:\.[A-Za-z0-9]+)*\.(?i:{_FILES})(?!{_X}|-{_X})",
    rf"{_TAG}|&(?:#\d+|(?i:quot|apos|[aeiou](?:acute|grave|uml)));",
    r"-(?i:[lr][rcs]b)-",
    r"[:;=][-o']?[()DPO\]\[\\|](?![A-Za-z])|\^_\^|-_-",
    # Telephone numbers and mixed fractions, the tokens that hold a space.
    r"\([2-9]\d{2}\) ?\d{3}-\d{4}|\d{3} \d{3}[ -]\d{4}(?!\d)",
    r"\d+[ \xa0]\d{1,4}[/⁄]\d{1,4}(?![\d/])",
    # Two curly quotes in a row, which no name on the removal list fits.
    r"[“”‘’]{2}",
    # Sizes and rates: C#, c++, US$.
    r"[CcFf]#|[Cc]\+\+|[A-Z]+\$",
    # Words that keep an apostrophe inside, and the clipped or dated ones that keep it in front.
    rf"(?<!['’‘`])(?:[dlnoA-HJ-XZ]|[Qq]u)['’‘`]{_L}{{2,}}|(?i:ne'er|e'er|nor'easter|cap'n|ma'ams?)(?!{_X})|[jYy]{_APOSTROPHE}(?={_L})(?!(?:s|d|m|ll|re|ve)(?!{_L}))",
    # Single words that Java knows, whatever is glued to their end but a contraction.
    rf"(?i:c'mon|s'mores|ev'ry|li'l|nat'l|cont'd\.|(?:dunkin|somethin|ol)'(?!(?:s|d|m|ll|re|ve)(?!{_L})))",
    # Between vowels, as in "Hallowe'en", and in "De'Andre".
    rf"{_L}+[aeiouyAEIOUY]['’‘`](?!(?i:re|ve|ll|s|d|m)(?!{_L}))[aeiouyA-Z]{_L}*",
    rf"'(?i:s|d|m|ll|re|ve)(?!{_L})|’(?i:s|d|m|ll|re|ve)",
    rf"{_APOSTROPHE}(?i:n{_APOSTROPHE}|em|(?:cause|till?|n(?!\.))(?!{_X}))|’[nN]|{_APOSTROPHE}[2-9]0[sS](?!{_X})|(?<!'){_APOSTROPHE}\d\d(?=\s|$)",
    r"'(?i:t)(?=(?i:is|was))",
    rf"(?i:n['’‘`]t){_L}*",
    # "isn" + "t" is "is" + "n't": the word stops before its n.
    rf"(?:{_X}+[-/])*{_L}+?(?<![nN])(?=(?i:n['’‘`]t))",
    # Dashes are one token, and of more than four one that stays. Before numbers: "away--400" has no "-400".
    r"-{2,}",
    # Else ".5" of "...5" would be taken for a number.
    r"\.{3}(?=\d)",
    # Abbreviations and initials with their period.
    rf"(?:{_KNOWN})\.(?![A-Za-z])|(?i:{'|'.join(_BEFORE_NUMBERS.split())})\.(?=\s*\d)|(?i:ph\.d)\.?(?!{_X})",
    # A period before another mark stays with its word: "no-op., and".
    rf"{_X}+(?:[-.!?‐‑]{_X}+)*\.(?=[,;:])",
    rf"{_ACRONYM}(?!{_L}|-{_X})|[A-Za-z]\.(?!{_L}|-{_X}|{_STARTER})",
    # Compounds, then numbers (longer ones win over a compound's first part), then words joined by a period or mark.
    rf"[A-Z]+[&+][A-Z]+|\d+-\d+/\d+|{_BETWEEN_SLASHES}(?:/{_BETWEEN_SLASHES}){{1,2}}|{_HEAD}(?:[-‐‑]{_PART}|_{_X}+)+",
    rf"{_X}*\d(?:\.\d+)*\.[xX](?=[\s.,!?-]|$)|[-+]?\d*(?:[.,:]\d+)+|[-+]\d+|\d+⁄\d+",
    rf"{_L}{_X}*(?:[.!?]{_L}{_X}*)+|{_X}+|#[A-Za-z]+",
    # Runs that make one token; "?!" and "!!" survive the removal, as they do in Java.
    r"[?!]+|\*+|_+|#+|>>|<<|@@|\\\*",
    # Any other visible sign is a token.
    rf"[^\s{_VANISHES}]",
)
_TOKEN = re.compile("|".join(f"(?:{pattern})" for pattern in _PATTERNS))

# A piece of a caption whose tokens do not depend on its neighbours: words, with the marks they usually carry.
_CHUNK = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*[.,!?;:]?|[.,!?;]")
# An end that the next word decides: a single letter or one of a few abbreviations, with a period.
_OPEN_END = re.compile(rf"(?:^|[^A-Za-z])(?:[A-Za-z]|(?i:{'|'.join(_BEFORE_NUMBERS.split())}))\.\s*$")

_SPLIT = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
    "lemme": ("lem", "me"),
    "gimme": ("gim", "me"),
}
_CURLY = {"“": "``", "”": "''", "‘": "`", "’": "'"}
_RENAMED = {
    **dict(zip("½¼¾⅓⅔", ("1/2", "1/4", "3/4", "1/3", "2/3"), strict=True)),
    **dict(zip("()[]{}", ("-lrb-", "-rrb-", "-lsb-", "-rsb-", "-lcb-", "-rcb-"), strict=True)),
    **dict.fromkeys('"“”«»', "''"),
    **dict.fromkeys("‘’‹›", "'"),
    # Two curly quotes make one token: together they may be a name that is not on the removal list.
    **{a + b: _CURLY[a] + _CURLY[b] for a in _CURLY for b in _CURLY},
    **dict.fromkeys([*"–—―", "---", "----"], "--"),
    "…": "...",
}
_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-"})
_CURLY_CONTRACTION = re.compile(rf"^(?:{_APOSTROPHE}(?:s|d|m|ll|re|ve)|n’t)$")


def clean_lines(caption: str) -> str:
    """Turn every line end (CR, LF, VT, FF, U+0085, U+2028, U+2029) into a space.

    Args:
        caption: Raw caption.

    Returns:
        A caption that stays one line in any program.
    """
    return _LINE_ENDS.sub(" ", caption)


def _rename(token: str) -> tuple[str, ...]:
    """Lower-case a raw token and write it as the Java tokeniser does."""
    lowered = token.lower()
    if lowered.isalpha():
        return _SPLIT.get(lowered, (lowered,))
    if lowered in _RENAMED:
        return (_RENAMED[lowered],)
    # A curly apostrophe is straightened in contractions only; "’90s" keeps its own.
    if "’" in lowered and _CURLY_CONTRACTION.match(lowered):
        return (lowered.replace("’", "'"),)
    # Faces keep their brackets, spelled out; none is on the removal list.
    if lowered[0] in ":;=(" and ("(" in lowered or ")" in lowered):
        lowered = lowered.translate(_BRACKETS)
    # "22 3/4", telephone numbers and tags are one token, held together by a no-break space.
    return (lowered.replace(" ", "\u00a0"),)


def _prepared(caption: str) -> str:
    """Spell out entities and signs that the token patterns do not know, and put spaces for line ends."""
    text = clean_lines(caption)
    if "&" in text:
        text = _ENTITY.sub(lambda match: (_QUOTES | _ENTITIES)[match[0].lower()], text)
    return text.translate(_CHARACTERS)


def ptb_tokens(caption: str, following: str = "") -> list[str]:
    """Split one caption as the PTB tokeniser does and drop the punctuation that coco-caption drops.

    Args:
        caption: Raw caption.
        following: The first word of the next caption, which a final "K." or "No." looks at.

    Returns:
        Lower-case tokens.
    """
    text = _prepared(caption)
    end = len(text)
    # A line end: no token reaches across it, only the look ahead does.
    matches = _TOKEN.finditer(f"{text}\n{_prepared(following)}" if following else text)
    found = (match[0] for match in matches if match.start() < end)
    return [token for raw in found for token in _rename(raw) if token not in REMOVED]


class _Chunks(dict[str, str]):
    """White-space delimited pieces of captions -> their tokens, for those that mean the same wherever they stand.

    COCO's 30,000 or so captions of an evaluation hold some 10,000 of them, so nearly every look-up is a hit.
    """

    def __missing__(self, chunk: str) -> str:
        """Tokenise a new piece; KeyError for one whose tokens may depend on its neighbours."""
        if not _CHUNK.fullmatch(chunk) or _OPEN_END.search(chunk):
            raise KeyError(chunk)
        return self.setdefault(chunk, " ".join(ptb_tokens(chunk)))


def tokenise_python(captions: Sequence[str]) -> list[str]:
    """Tokenise captions with the Python twin.

    As in Java, captions are one text: whether a final "K." keeps its period depends on the caption that comes next.

    Args:
        captions: Raw captions.

    Returns:
        Tokens of each caption, joined by single spaces.
    """
    chunks = _Chunks()
    out = []
    for index, caption in enumerate(captions):
        try:
            # filter: a mark that stands alone leaves nothing.
            out.append(" ".join(filter(None, map(chunks.__getitem__, caption.split()))))
        except KeyError:
            out.append(" ".join(ptb_tokens(caption, _next_word(captions, index) if _OPEN_END.search(caption) else "")))
    return out


def _next_word(captions: Sequence[str], index: int) -> str:
    """First word after a caption, in the next one that has any."""
    return next((words[0] for words in (later.split(maxsplit=1) for later in captions[index + 1 :]) if words), "")


def tokenise_none(captions: Sequence[str]) -> list[str]:
    """Take captions that are tokenised already: only line ends become spaces.

    Args:
        captions: Tokenised captions.

    Returns:
        The same captions.
    """
    return [clean_lines(caption) for caption in captions]


def tokenise_java(captions: Sequence[str]) -> list[str]:
    """Tokenise captions with the Java tokeniser that the official code calls.

    Args:
        captions: Raw captions.

    Returns:
        Tokens of each caption, joined by single spaces.

    Raises:
        InputError: Java or the jar is missing, or the tokeniser failed.
    """
    lines = tokenise_lines([clean_lines(caption) for caption in captions]) if captions else []
    return [" ".join(word for word in line.rstrip().split(" ") if word not in REMOVED) for line in lines]


TOKENIZERS: dict[str, Callable[[Sequence[str]], list[str]]] = {
    "python": tokenise_python,
    "java": tokenise_java,
    "none": tokenise_none,
}
