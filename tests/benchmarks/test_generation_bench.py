"""The generation benchmark compares equal answers; how fast it is, is no test."""

from __future__ import annotations

import pytest

from mmkit.bench import generation, run_bench
from mmkit.errors import InputError

SMALL = {"pictures": "4", "batch": "6", "width": "32", "layers": "1", "max_new_tokens": "4", "repeats": "1"}


def test_gives_figures_of_all_sides() -> None:
    found = run_bench("generation", SMALL)
    numbers = {key: value for key, value in found.items() if not isinstance(value, str)}
    assert all(value > 0 for value in numbers.values()), numbers
    assert {"mmkit / one by one", "batches alone, mmkit / one by one", "one by one, answers/s"} <= set(numbers)
    count = found["questions"].split()[0]
    assert found["equal answers"] == f"{count} of {count}" and "16 image tokens, 6 at a time" in found["conditions"]
    # A model that says the same of everything would compare nothing.
    assert int(found["questions"].rpartition(", ")[2].split()[0]) > int(count) / 4


def test_other_answers_end_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "answer_one_by_one", lambda mllm, examples, how: {e.id: "no" for e in examples})
    with pytest.raises(AssertionError, match="answers differ from the loop's"):
        run_bench("generation", SMALL)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="image_size is a multiple of patch, and width of 32"):
        run_bench("generation", {"patch": "15"})
