from __future__ import annotations

import json
import subprocess
import sys

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mmkit.errors import InputError
from mmkit.models.llm import build_llm, load_tokenizer, train_bpe_tokenizer, train_sentencepiece_tokenizer

from .tiny import GPT2, LLAMA, TEXTS, gpt2, llama, tokenizer

OPEN_WITHOUT_MMKIT = """
import json, sys
sys.modules["mmkit"] = None
from transformers import AutoTokenizer
print(json.dumps([AutoTokenizer.from_pretrained(sys.argv[1])(t).input_ids for t in json.loads(sys.argv[2])]))
"""


@pytest.mark.parametrize("train", [train_bpe_tokenizer, train_sentencepiece_tokenizer])
def test_tokenizer_is_the_same_for_any_order_and_opens_without_mmkit(train, tmp_path):
    made = train(TEXTS, tmp_path / "a", vocab_size=320)
    train([*reversed(TEXTS), *TEXTS, "  "], tmp_path / "b", vocab_size=320)
    first = (tmp_path / "a" / "tokenizer.json").read_bytes()
    assert first == (tmp_path / "b" / "tokenizer.json").read_bytes()
    texts = ["a red circle.", "ünknown ☃ 12", "two\nlines"]
    command = [sys.executable, "-c", OPEN_WITHOUT_MMKIT, str(tmp_path / "a"), json.dumps(texts)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    ids = json.loads(out.stdout)
    assert ids == [made(text).input_ids for text in texts]
    assert [made.decode(row, skip_special_tokens=True) for row in ids] == texts


def test_bpe_is_gpt2s_layout(tmp_path):
    made = train_bpe_tokenizer(TEXTS, tmp_path, vocab_size=300)
    assert len(made) <= 300
    assert made.eos_token == made.bos_token == "<|endoftext|>"
    assert made("<|endoftext|>").input_ids == [made.eos_token_id]
    assert made("a").input_ids[0] not in made.all_special_ids, "no start token is put in front"


def test_bpe_needs_room_for_all_bytes(tmp_path):
    with pytest.raises(InputError, match="257"):
        train_bpe_tokenizer(TEXTS, tmp_path, vocab_size=100)


@pytest.mark.parametrize("train", [train_bpe_tokenizer, train_sentencepiece_tokenizer])
def test_no_text_is_refused(train, tmp_path):
    with pytest.raises(InputError, match="no text"):
        train(["", "   "], tmp_path, vocab_size=300)


def test_sentencepiece_folder_has_both_files_and_llama_ids(tmp_path):
    made = train_sentencepiece_tokenizer(TEXTS, tmp_path, vocab_size=330)
    assert (made.unk_token_id, made.bos_token_id, made.eos_token_id) == (0, 1, 2)
    again = load_tokenizer(tmp_path)
    assert again("a dog").input_ids[0] == 1
    assert again("a dog").input_ids[-1] != 2
    assert (tmp_path / "tokenizer.model").stat().st_size > 0
    assert len(again) == sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).vocab_size()


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="abc redsquare.,?!12\n☃é</s>", min_size=1, max_size=40).map(str.strip).filter(bool))
def test_ids_equal_sentencepieces_own(text):
    made = tokenizer("sp", image=False)
    reference = sentencepiece.SentencePieceProcessor(model_file=f"{made.name_or_path}/tokenizer.model")
    assert made(text, add_special_tokens=False, split_special_tokens=True).input_ids == reference.encode(text)


def test_vocabulary_larger_than_the_texts_is_lowered(tmp_path):
    made = train_sentencepiece_tokenizer(TEXTS, tmp_path, vocab_size=30000)
    assert 260 < len(made) < 1000


def test_random_llm_depends_on_the_seed_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = llama(seed=1), llama(seed=1), llama(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert not first.training


def test_tokenizer_fills_vocabulary_and_special_ids():
    made = tokenizer("bpe", image=False)
    model = gpt2(made)
    assert model.config.vocab_size == len(made)
    assert model.config.eos_token_id == made.eos_token_id == model.generation_config.eos_token_id


def test_dtype_words():
    assert build_llm(None, config=dict(LLAMA, vocab_size=50), dtype="bf16").dtype == torch.bfloat16
    with pytest.raises(InputError, match="float99"):
        build_llm(None, config=dict(LLAMA), dtype="float99")


def test_saved_llm_opens_by_folder(tmp_path):
    model = llama(vocab_size=40)
    model.save_pretrained(tmp_path)
    again = build_llm(str(tmp_path))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    fresh = build_llm(str(tmp_path), pretrained=False, seed=3)
    assert fresh.config.hidden_size == 32
    assert not torch.equal(fresh.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("name", "config", "match"),
    [
        (None, None, "name or a config"),
        ("x", dict(GPT2), "name or a config"),
        (None, {"hidden_size": 4}, "model_type"),
        (None, {"model_type": "lama"}, "lama"),
        (None, {**LLAMA, "hiden_size": 4}, "hidden_size"),
        (None, {**GPT2, "n_emb": 4}, "n_embd"),
    ],
)
def test_bad_llm_choice_is_one_clear_line(name, config, match):
    with pytest.raises(InputError, match=match) as caught:
        build_llm(name, config=config)
    assert "\n" not in str(caught.value)


def test_missing_names_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="local folder"):
        build_llm(str(tmp_path / "none"))
    with pytest.raises(InputError, match="local folder"):
        load_tokenizer(tmp_path / "none")


def test_tokenizer_of_tiny_helper_is_what_autotokenizer_gives():
    made = tokenizer("sp", image=False)
    assert type(AutoTokenizer.from_pretrained(made.name_or_path)) is type(made)


def test_an_empty_model_has_shapes_and_ties_and_no_memory():
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 50}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
    full, empty = build_llm(None, config=config), build_llm(None, config=config, dtype="bf16", empty=True)
    assert {n: p.shape for n, p in full.named_parameters()} == {n: p.shape for n, p in empty.named_parameters()}
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in empty.parameters()) and not empty.training
    assert empty.get_output_embeddings().weight is empty.get_input_embeddings().weight
