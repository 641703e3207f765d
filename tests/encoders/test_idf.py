"""Online IDF: whole counts, the same on any number of processes, and the reference's weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mmkit.encoders import OnlineIDF, pack_labels, row_normalised
from mmkit.encoders.idf import load_table, save_table
from mmkit.encoders.ragged import first_in_row, row_of_label
from mmkit.errors import InputError

from .helpers import random_rows

ROWS = st.lists(st.lists(st.integers(0, 10), max_size=5), max_size=12)


def test_weights_follow_the_formula_and_are_zero_at_first() -> None:
    idf = OnlineIDF(4)
    assert idf.weights().tolist() == [0.0] * 4
    idf.update(*pack_labels([[0, 1], [0, 2, 2], []]))
    assert idf.df.tolist() == [2, 1, 1, 0]  # a repeat counts once
    assert idf.n.tolist() == [2]  # a row without labels is no document
    expected = torch.tensor([0.0, math.log(3 / 2), math.log(3 / 2), math.log(3)])
    torch.testing.assert_close(idf.weights(), expected)
    assert idf.weights().dtype == torch.float32


@given(ROWS)
@settings(max_examples=50, deadline=None)
def test_counts_equal_python_sets(rows: list[list[int]]) -> None:
    idf = OnlineIDF(11)
    idf.update(*pack_labels(rows))
    assert idf.df.tolist() == [sum(label in set(row) for row in rows) for label in range(11)]
    assert idf.n.item() == sum(bool(row) for row in rows)
    assert (idf.weights() >= 0).all()


def test_eight_ranks_of_one_row_equal_one_rank_of_eight_rows() -> None:
    rows = random_rows(8, 30)
    one, eight = OnlineIDF(30), OnlineIDF(30)
    one.update(*pack_labels(rows))
    eight.absorb(torch.stack([eight.counts(*pack_labels([row])) for row in rows]).sum(dim=0))
    assert torch.equal(one.df, eight.df) and torch.equal(one.n, eight.n)
    assert torch.equal(one.weights(), eight.weights())


def test_equals_the_reference_for_a_constant_batch() -> None:
    """open_clip/loss.py:441-447: float64 running means, the number of steps, and 1/Bg under the logarithm."""
    vocab_size, batch = 20, 8
    idf, cap_fq, steps = OnlineIDF(vocab_size), torch.zeros(vocab_size, dtype=torch.float64), 0
    for step in range(3):
        rows = [row or [step] for row in random_rows(batch, vocab_size, seed=step)]
        k_hot = torch.zeros(batch, vocab_size, dtype=torch.float64)
        for index, row in enumerate(rows):
            k_hot[index, row] = 1.0
        cap_fq += k_hot.sum(dim=0) / batch
        steps += 1
        idf.update(*pack_labels(rows))
    expected = torch.log((steps + 1 / batch) / (cap_fq + 1 / batch))
    torch.testing.assert_close(idf.weights(), expected.float())


def test_state_survives_casts_and_checkpoints() -> None:
    idf = OnlineIDF(3)
    idf.update(*pack_labels([[0], [0, 1]] * 1000))
    idf.to(torch.bfloat16).half()
    assert idf.df.dtype == idf.n.dtype == torch.int64
    other = OnlineIDF(3)
    other.load_state_dict(idf.state_dict())
    assert other.df.tolist() == [2000, 1000, 0] and other.n.tolist() == [2000]


def test_row_weights_sum_to_one_or_zero() -> None:
    ids, offsets = pack_labels([[0, 1], [2], [], [3, 3, 1]])
    weights = row_normalised(torch.tensor([1.0, 3.0, 0.0, 1.0]), ids, offsets)
    assert weights.dtype == torch.float32
    # The third label weighs nothing: its row adds nothing. The repeat in the last row counts once.
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.75, 0.0, 0.25, 0.0, 0.75]))


def test_nothing_at_all() -> None:
    ids, offsets = pack_labels([])
    assert ids.shape == (0,) and offsets.tolist() == [0]
    assert row_normalised(torch.ones(3), ids, offsets).shape == (0,)
    assert OnlineIDF(3).counts(ids, offsets).tolist() == [0, 0, 0, 0]


def test_ragged_helpers() -> None:
    ids, offsets = pack_labels([[5, 5], [], [5, 1, 5]])
    rows = row_of_label(offsets, len(ids))
    assert rows.tolist() == [0, 0, 2, 2, 2]
    assert first_in_row(ids, rows, 6).tolist() == [True, False, True, True, False]


def table(folder: Path, **changes: Any) -> Path:
    """A table of four labels over ten captions."""
    file = folder / "idf.safetensors"
    kept = {"df": torch.tensor([10, 0, 3, 5]), "n": 10, "sha256": "a" * 64, "name": "clip", "source": "corpus", **changes}
    save_table(file, kept.pop("df"), kept.pop("n"), **kept)
    return file


def test_a_table_comes_back_and_weighs_as_online_counts_do(tmp_path: Path) -> None:
    df, n = load_table(table(tmp_path), sha256="a" * 64, vocab_size=4)
    assert df.tolist() == [10, 0, 3, 5] and n == 10
    assert [path.name for path in tmp_path.iterdir()] == ["idf.safetensors"]
    idf = OnlineIDF(4, df, n, frozen=True)
    expected = [math.log(11 / (count + 1)) for count in (10, 0, 3, 5)]
    torch.testing.assert_close(idf.weights(), torch.tensor(expected))
    for change in (lambda: idf.counts(*pack_labels([[0]])), lambda: idf.absorb(torch.zeros(5, dtype=torch.int64))):
        with pytest.raises(AssertionError, match="takes no counts"):
            change()


def test_counts_go_on_from_a_table_without_changing_it() -> None:
    df = torch.tensor([2, 0])
    idf = OnlineIDF(2, df, 3)
    idf.update(*pack_labels([[1]]))
    assert idf.df.tolist() == [2, 1] and idf.n.tolist() == [4] and df.tolist() == [2, 0]
    with pytest.raises(AssertionError, match="weigh every label 0"):
        OnlineIDF(2, frozen=True)


def test_a_table_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    file = table(tmp_path)
    with pytest.raises(InputError, match=r"clip \(4 labels, sha256 a{12}\), not the one in use \(4 labels, sha256 b{12}\)"):
        load_table(file, sha256="b" * 64, vocab_size=4)
    with pytest.raises(InputError, match=r"clip \(4 labels, .*not the one in use \(5 labels"):
        load_table(file, sha256="a" * 64, vocab_size=5)


@pytest.mark.parametrize("change", [{"df": torch.tensor([11, 0, 0, 0])}, {"df": torch.tensor([-1, 0, 0, 0])}, {"n": 9}])
def test_impossible_counts_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="whole numbers from 0 to"):
        load_table(table(tmp_path, **change), sha256="a" * 64, vocab_size=4)


def test_other_files_are_no_tables(tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    with pytest.raises(InputError, match="no such IDF table; write the table again"):
        load_table(file, sha256="a", vocab_size=4)
    file.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read"):
        load_table(file, sha256="a", vocab_size=4)
    save_file({"df": torch.zeros(4)}, file)
    with pytest.raises(InputError, match="no IDF table"):
        load_table(file, sha256="a", vocab_size=4)


def test_a_table_that_left_labels_uncounted_is_for_the_same_stop_words_only(tmp_path: Path) -> None:
    file = table(tmp_path, dropped=[3, 1])
    assert load_table(file, sha256="a" * 64, vocab_size=4, dropped={1, 2, 3})[1] > 0
    with pytest.raises(InputError, match=r"without 2 labels \(stop words\) that are in use here.*data\.stop_words"):
        load_table(file, sha256="a" * 64, vocab_size=4)


def test_a_table_of_cut_captions_is_for_captions_cut_as_much(tmp_path: Path) -> None:
    file = table(tmp_path, context_length=16)
    for length in (3, 16):
        assert load_table(file, sha256="a" * 64, vocab_size=4, context_length=length)[1] > 0
    for length in (17, None):
        with pytest.raises(InputError, match=r"cut at 16 tokens, here they are cut at (17|no length)"):
            load_table(file, sha256="a" * 64, vocab_size=4, context_length=length)
    assert load_table(table(tmp_path), sha256="a" * 64, vocab_size=4, context_length=5)[1] > 0  # more was counted, not less
