"""GQA (Hudson & Manning 2019): files, rules and metrics of the official ``eval.py`` (Stanford)."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmkit.errors import InputError
from mmkit.eval.scorers.formats import check_rows
from mmkit.eval.scorers.json_files import Source, listed, load_json
from mmkit.eval.statistics import Floats

_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Groups of answers that count as valid and plausible wherever two things are compared ("What do they have in common?").
_COMMON = ("color", "material", "shape")


class GqaQuestion(NamedTuple):
    """One question of the official file; answer, types, group and entailed ones are empty in a test set."""

    image_id: str
    question: str
    balanced: bool
    answer: str = ""
    structural: str = ""
    semantic: str = ""
    detailed: str = ""
    group: str | None = None
    entailed: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """``open`` for a query, ``binary`` for everything else, as upstream has it (also "choose" is binary)."""
        return "open" if self.structural == "query" else "binary"


def as_written(prediction: str, answer: str) -> tuple[str, str]:
    """The official rule: equal as they are written."""
    return prediction, answer


def rule_llava(prediction: str, answer: str) -> tuple[str, str]:
    """LLaVA's convert_gqa_for_eval.py before the official rule: final periods go, letters become small."""
    return prediction.rstrip(".").lower(), answer


def rule_lmms(prediction: str, answer: str) -> tuple[str, str]:
    """lmms-eval's exact match: neither letter case nor ASCII punctuation counts, on either side."""
    return prediction.lower().translate(_PUNCTUATION), answer.lower().translate(_PUNCTUATION)


RULES: dict[str, Callable[[str, str], tuple[str, str]]] = {"llava": rule_llava, "lmms": rule_lmms, "official": as_written}
RULE_SOURCES = {
    "llava": "Stanford eval.py after LLaVA convert_gqa_for_eval.py (c121f04)",
    "lmms": "lmms-eval 0.7 gqa, exact_match",
    "official": "Stanford eval.py",
}


def read_gqa(source: Source, *, answers: bool = True) -> dict[str, GqaQuestion]:
    """Read a GQA question file.

    Args:
        source: ``{id: {"question", "imageId", "isBalanced", "answer", "types", "groups", "entailed", ...}}`` or a path to it.
        answers: Whether it has answers and types; those of the test and challenge sets have none.

    Returns:
        Question id -> question, in file order.

    Raises:
        InputError: Not such an object, fields missing or of the wrong type.
    """
    data, name = load_json(source, "annotations" if answers else "questions", unique=True)
    if not isinstance(data, dict) or not data:
        what = "no questions in the file" if data == {} else f"GQA questions are an object by id, this is {type(data).__name__}"
        raise InputError(what, where=name, mend="give e.g. testdev_balanced_questions.json")
    fields = {"question": str, "imageId": str, **({"answer": str} if answers else {})}
    # With the id put in, so that a message can name it.
    rows = [{**row, "id": key} if isinstance(row, dict) else row for key, row in data.items()]
    if answers and not any("answer" in row for row in rows if isinstance(row, dict)):
        mend = "give an annotated split; a test set's answers are with its server"
        raise InputError('no question has an "answer", as in the file of a test set', where=name, mend=mend)
    check_rows(rows, fields, kind="question", key="id", name=name)
    wrong = [row["id"] for row in rows if not isinstance(row.get("isBalanced"), bool) or (answers and not _has_types(row))]
    if wrong:
        what = f"questions without isBalanced (true or false){', types or groups' if answers else ''}: {listed(wrong)}"
        raise InputError(what, where=name, mend="give the official file as it is")
    return {row["id"]: _question(row, answers) for row in rows}


def _has_types(row: Mapping[str, Any]) -> bool:
    """Whether types, groups and entailed questions are what the metrics need."""
    types, groups, entailed = row.get("types"), row.get("groups"), row.get("entailed", [])
    return (
        isinstance(types, dict)
        and all(isinstance(types.get(key), str) for key in ("structural", "semantic", "detailed"))
        and isinstance(groups, dict)
        and isinstance(groups.get("global"), (str, type(None)))
        and isinstance(entailed, list)
        and all(isinstance(key, str) for key in entailed)
    )


def _question(row: Mapping[str, Any], answers: bool) -> GqaQuestion:
    """A checked row."""
    text = row["imageId"], row["question"], row["isBalanced"]
    if not answers:
        return GqaQuestion(*text)
    types = row["types"]["structural"], row["types"]["semantic"], row["types"]["detailed"]
    return GqaQuestion(*text, row["answer"], *types, row["groups"].get("global"), tuple(row.get("entailed", ())))


class Distribution:
    """How far the predicted answers' frequencies are from the true ones, of any weighting of the questions."""

    def __init__(self, scored: Sequence[tuple[str | None, str, str]]) -> None:
        """Number the groups and their true answers.

        Args:
            scored: Global group, true answer and predicted answer of each of N questions; those without a group count nothing.
        """
        # Answers that are never true in their group count only by what is missing elsewhere, as upstream.
        places: dict[tuple[str, str], int] = {}
        groups: dict[str, int] = {}
        for group, answer, _ in scored:
            if group is not None:
                places.setdefault((group, answer), len(places))
                groups.setdefault(group, len(groups))
        self.group_of_place = np.array([groups[group] for group, _ in places], dtype=np.int64)
        # One more place for what does not count.
        other = len(places)
        gold = [other if group is None else places[group, answer] for group, answer, _ in scored]
        said = [other if group is None else places.get((group, text), other) for group, _, text in scored]
        self.gold, self.said = np.array(gold, dtype=np.int64), np.array(said, dtype=np.int64)
        self.known = bool(places)

    def of(self, weights: Floats) -> float:
        """Chi-square of each group, weighted by its size, / 100.

        Args:
            weights: f64[N], how often each question counts.

        Returns:
            Lower is better; NaN where no question that counts has a group.
        """
        places = len(self.group_of_place)
        expected = np.bincount(self.gold, weights, places + 1)[:places]
        found = np.bincount(self.said, weights, places + 1)[:places]
        chi = np.divide((found - expected) ** 2, expected, out=np.zeros(places), where=expected > 0)
        # Weighted by questions, so that a group of three does not count like one of a thousand.
        sizes = np.bincount(self.group_of_place, expected)
        total = sizes.sum()
        return float(np.bincount(self.group_of_place, chi) @ sizes / total / 100) if total > 0 else math.nan


def consistency(asked: Mapping[str, GqaQuestion], scored: Sequence[str], right: Mapping[str, bool]) -> Floats:
    """Share of the questions entailed by each rightly answered one that are answered rightly, too; the metric is their mean.

    Args:
        asked: All questions, balanced or not.
        scored: Ids of the N balanced ones.
        right: Whether each answered question, balanced or not, was answered rightly.

    Returns:
        f64[N], fractions; NaN for wrong answers and where nothing is entailed.

    Raises:
        KeyError: An entailed question has no answer (see `unanswered`).
    """
    shares = np.full(len(scored), math.nan)
    for place, key in enumerate(scored):
        # Upstream's lists name the question itself, too.
        others = [other for other in asked[key].entailed if other != key]
        if right[key] and others:
            shares[place] = sum(right[other] for other in others) / len(others)
    return shares


def unanswered(asked: Mapping[str, GqaQuestion], scored: Sequence[str], answered: Mapping[str, Any]) -> int:
    """How many of the questions that the scored ones entail are not in the file, or have no answer."""
    entailed = {other for key in scored for other in asked[key].entailed}
    return sum(other not in asked or other not in answered for other in entailed)


def read_choices(source: str, scored: Sequence[str]) -> dict[str, tuple[list[str], list[str]]]:
    """Read GQA's choices file: valid and plausible answers of each question.

    Args:
        source: ``{id: {"valid": [...], "plausible": [...]}}``; released for train and val alone.
        scored: Ids that need them.

    Raises:
        InputError: A question has none.
    """
    data, name = load_json(source, "choices", unique=True)
    # Only of what is scored: the file has all questions of a split.
    rows = {key: data.get(key) if isinstance(data, dict) else None for key in scored}
    parts = ("valid", "plausible")
    wrong = [k for k, row in rows.items() if not isinstance(row, dict) or not all(isinstance(row.get(p), list) for p in parts)]
    if wrong:
        what = f'no lists "valid" and "plausible" for {listed(wrong)}'
        raise InputError(what, where=name, mend="give the choices file of the questions' own split")
    return {key: (row["valid"], row["plausible"]) for key, row in rows.items() if row is not None}


def belongs(prediction: str, group: Sequence[str], question: GqaQuestion) -> bool:
    """Whether an answer is one of a group; questions on what two things have in common have their own three, as upstream."""
    return prediction in (_COMMON if "Common" in question.detailed else group)
