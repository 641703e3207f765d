"""Greedy, beams, sampling, and the paper's beams against a loop for one picture without a cache."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GenerationConfig

from mmkit.config import DecodingConfig
from mmkit.errors import InputError
from mmkit.models.captioning import caption_ids, end_token, period_token, stop_tokens, write_captions
from mmkit.models.clipcap import build_clipcap, check_fit, load_captioner, save_captioner
from mmkit.models.decoding import choose_decoding, draw_seed
from mmkit.models.generation import stop_ids

from .tiny import gpt2, llama, tokenizer

OTHERS = {
    "qwen2": {
        "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "opt": {
        "model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "word_embed_proj_dim": 32, "max_position_embeddings": 128,
    },
    "gpt_neox": {
        "model_type": "gpt_neox", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    },
    # These do more to their logits than multiply by a matrix.
    "gemma2": {
        "model_type": "gemma2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 0.1,
    },
    "granite": {
        "model_type": "granite", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "logits_scaling": 0.25,
    },
}  # fmt: skip


def language_model(kind="gpt2", tok=None, **more):
    # Wide random weights: texts vary from picture to picture, and no two scores are equal.
    if kind == "gpt2":
        return gpt2(tok, initializer_range=0.3, **more)
    if kind == "llama":
        return llama(tok, initializer_range=0.3, **more)
    from mmkit.models.llm import build_llm

    wide = "init_std" if kind == "opt" else "initializer_range"
    return build_llm(None, config={**OTHERS[kind], wide: 0.3, **more}, seed=0, tokenizer=tok)


def make(kind="gpt2", tok=None, **more):
    tok = tok or tokenizer("bpe", image=False)
    settings = {"feature_dim": 12, "prefix_length": 4, "mapper_layers": 1, "mapper_heads": 4, **more}
    return build_clipcap(language_model(kind, tok), **settings)


def features(rows=5, seed=0):
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed)) * 3


def next_logits(model, row, ids):
    """Logits f[V] of the token after ``ids``, by a forward pass over everything."""
    embeds = model.prefix(row[None])
    if ids:
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([ids]))], dim=1)
    with torch.no_grad():
        return model.lm(inputs_embeds=embeds, use_cache=False).logits[0, -1].float()


def published_beams(model, row, *, beams, length, stop):
    """facts/clipcap.md 5, word for word: one picture, no cache, all (beam x vocabulary) scores in one table."""
    logp = next_logits(model, row, []).log_softmax(-1)
    scores, first = logp.topk(beams)
    tokens = [[int(t)] for t in first]
    lengths = torch.ones(beams)
    stopped = torch.tensor([t[0] in stop for t in tokens])
    for _ in range(length - 1):
        if stopped.all():
            break
        table = torch.stack([next_logits(model, row, ids).log_softmax(-1) for ids in tokens])
        table[stopped] = -torch.inf
        table[stopped, 0] = 0
        sums = scores[:, None] + table
        lengths[~stopped] += 1
        average, best = (sums / lengths[:, None]).flatten().topk(beams)
        source, token = best // table.shape[1], best % table.shape[1]
        lengths, tokens = lengths[source], [tokens[s] + [int(t)] for s, t in zip(source, token, strict=True)]
        scores = average * lengths
        stopped = stopped[source] | torch.tensor([int(t) in stop for t in token])
    best = int((scores / lengths).argmax())
    return tokens[best][: int(lengths[best])]


def some_stops(model, rows):
    """Tokens that the model writes here and there, so that some captions end early, some late, and some not at all."""
    free = model.generate(rows, DecodingConfig(decoding="paper", num_beams=1, max_new_tokens=12), stop=[]).tolist()
    return [free[0][2], free[1][5], free[2][8]]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("beams", [1, 5])
def test_the_papers_beams_equal_the_published_loop(kind, beams):
    model = make(kind)
    rows = features(6)
    stop = some_stops(model, rows)
    want = [published_beams(model, row, beams=beams, length=12, stop=stop) for row in rows]
    lengths = {len(ids) for ids in want}
    assert len(lengths) > 1, "captions of one length would test little"
    how = DecodingConfig(decoding="paper", num_beams=beams, max_new_tokens=12)
    fill = 5
    model.lm.generation_config.pad_token_id = fill
    got = model.generate(rows, how, stop=stop).tolist()
    assert [row[: len(ids)] for row, ids in zip(got, want, strict=True)] == want
    assert all(set(row[len(ids) :]) <= {fill} for row, ids in zip(got, want, strict=True))
    assert len(got[0]) == max(lengths)


def test_the_papers_beams_stop_where_the_average_is_best():
    # Not where the sum is: the rule without its division by length gives other captions on the same model.
    model, rows = make(), features(6)
    stop = some_stops(model, rows)
    how = DecodingConfig(decoding="paper", max_new_tokens=12)
    assert how.num_beams == 5
    assert model.generate(rows, how, stop=stop).tolist() != model.generate(
        rows, DecodingConfig(num_beams=5, max_new_tokens=12, length_penalty=0.0), stop=stop
    ).tolist()  # fmt: skip


def test_in_step_with_others_every_process_makes_the_same_number_of_passes(monkeypatch):
    model, rows = make(), features(6)
    stop = some_stops(model, rows)
    how = DecodingConfig(decoding="paper", max_new_tokens=12)
    alone = model.generate(rows, how, stop=stop)
    passes = []
    model.lm.register_forward_hook(lambda *_: passes.append(1))
    asked: list[bool] = []
    # Another process that always has something left: twelve passes, though this one may be done before.
    got = model.generate(rows[:1], how, stop=stop, together=lambda mine: asked.append(mine) or True)
    assert len(passes) == 12 and len(asked) == 11
    first = alone[0].tolist()
    assert got[0].tolist() == first[: got.shape[1]]
    # Texts that end at their first token leave nothing to do but in step.
    passes.clear()
    every = list(range(model.lm.config.vocab_size))
    assert model.generate(rows, how, stop=every).shape == (6, 1) and len(passes) == 1
    model.generate(rows, how, stop=every, together=lambda mine: len(passes) < 3)
    assert len(passes) == 3


@pytest.mark.parametrize("kind", ["gpt2", "llama", *OTHERS])
def test_greedy_equals_the_loop_without_cache(kind):
    model = make(kind)
    rows = features(3)
    stop = [47, 160, 260]
    got = model.generate(rows, DecodingConfig(max_new_tokens=6), stop=stop).tolist()
    for row, out in zip(rows, got, strict=True):
        ids: list[int] = []
        while len(ids) < 6 and not (ids and ids[-1] in stop):
            ids.append(int(next_logits(model, row, ids).argmax()))
        assert out[: len(ids)] == ids


@pytest.mark.parametrize("kind", OTHERS)
def test_loss_equals_the_language_models_own(kind):
    model = make(kind)
    rows, ids = features(3), torch.randint(1, 300, (3, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] + [0] * 4])
    labels = ids.masked_fill(mask == 0, -100)
    embeds = torch.cat([model.prefix(rows), model.get_input_embeddings()(ids)], dim=1)
    whole = torch.cat([torch.full((3, 4), -100), labels], dim=1)
    twin = model.lm(inputs_embeds=embeds, attention_mask=torch.cat([torch.ones(3, 4).long(), mask], 1), labels=whole)
    out = model(rows, ids, mask, labels)
    torch.testing.assert_close(out.loss_sum, twin.loss * 9, rtol=1e-5, atol=1e-5)
    assert out.num_tokens == 9
    torch.testing.assert_close(model(rows, ids, mask).logits[:5], twin.logits[0, 3:8], rtol=1e-5, atol=1e-5)


WAYS = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "beam, penalty": {"num_beams": 3, "length_penalty": 2.0},
    "sample": {"decoding": "sample", "temperature": 1.5, "top_p": 0.95, "top_k": 50, "seed": 3},
    "paper": {"decoding": "paper"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mapper", ["mlp", "transformer"])
def test_a_batch_of_one_equals_a_batch_of_many(way, mapper):
    model, rows = make(mapper=mapper), features(6)
    stop = some_stops(model, rows)
    how = DecodingConfig(max_new_tokens=9, **WAYS[way])
    draws = [draw_seed(how.seed or 0, bytes([i])) for i in range(len(rows))]
    many = model.generate(rows, how, stop=stop, draws=draws)
    for i, whole in enumerate(many):
        one = model.generate(rows[i : i + 1], how, stop=stop, draws=draws[i : i + 1])[0]
        assert torch.equal(whole[: len(one)], one)


def test_draws_have_the_models_probabilities():
    model, row = make(), features(1)
    how = {"decoding": "sample", "max_new_tokens": 1}
    count = 4000
    many = row.expand(count, -1)

    def shares(**more):
        draws = [draw_seed(0, str(i).encode()) for i in range(count)]
        ids = model.generate(many, DecodingConfig(**how, **more), draws=draws)[:, 0]
        return torch.bincount(ids, minlength=model.lm.config.vocab_size) / count

    logits = next_logits(model, row[0], [])
    torch.testing.assert_close(shares(), logits.softmax(-1), atol=0.025, rtol=0)
    torch.testing.assert_close(shares(temperature=2.0), (logits / 2).softmax(-1), atol=0.025, rtol=0)
    top = shares(top_k=3)
    assert set(top.nonzero().flatten().tolist()) == set(logits.topk(3).indices.tolist())
    order = logits.softmax(-1).sort(descending=True)
    kept = int((order.values.cumsum(0) < 0.3).sum()) + 1
    assert set(shares(top_p=0.3).nonzero().flatten().tolist()) == set(order.indices[:kept].tolist())
    torch.testing.assert_close(top[logits.topk(3).indices], logits.topk(3).values.softmax(-1), atol=0.025, rtol=0)


def test_the_seed_decides_the_draws():
    model, rows = make(), features(3)

    def drawn(seed):
        how = DecodingConfig(decoding="sample", seed=seed, max_new_tokens=8)
        return model.generate(rows, how, draws=[draw_seed(seed, bytes([i])) for i in range(3)]).tolist()

    torch.manual_seed(1)
    first = drawn(0)
    torch.manual_seed(2)
    assert drawn(0) == first != drawn(1)


def test_a_chat_models_own_settings_change_nothing():
    tok = tokenizer("bpe", image=False)
    plain, chatty = language_model(tok=tok), language_model(tok=tok)
    chatty.generation_config = GenerationConfig(
        repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, temperature=0.1, length_penalty=9.0, eos_token_id=0
    )
    found = [build_clipcap(lm, feature_dim=12, prefix_length=4) for lm in (plain, chatty)]
    for how in (DecodingConfig(max_new_tokens=8), DecodingConfig(max_new_tokens=8, num_beams=3)):
        first, second = (model.generate(features(4), how, stop=[7]) for model in found)
        assert torch.equal(first, second)


def test_more_tokens_than_positions_are_refused():
    model = make()
    with pytest.raises(InputError, match=r"130 new tokens are more than the 124 positions .*give at most 124"):
        model.generate(features(1), DecodingConfig(max_new_tokens=130))
    with pytest.raises(InputError, match=r"prefix_length 4 and max_length 125 are more than its 128 positions"):
        check_fit(model, tokenizer("bpe", image=False), 125)
    small = build_clipcap(gpt2(None, vocab_size=10), feature_dim=12, prefix_length=4)
    with pytest.raises(InputError, match=r"llm\.tokenizer: the tokenizer has \d+ tokens, the language model 10 embeddings"):
        check_fit(small, tokenizer("bpe", image=False), 20)
    check_fit(model, tokenizer("bpe", image=False), 124)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.5}, "temperature belong to decoding=sample, not to search"),
        ({"decoding": "paper", "top_p": 0.5}, "top_p belong to decoding=sample, not to paper"),
        ({"decoding": "sample", "num_beams": 2}, "num_beams belongs to decoding=search or paper"),
        ({"length_penalty": 2.0}, "length_penalty belongs to decoding=search with num_beams of 2 or more"),
        ({"decoding": "contrastive"}, "decoding: Input should be 'search', 'sample' or 'paper'"),
        ({"beams": 2}, "beams: Extra inputs are not permitted.*known settings: max_new_tokens, decoding"),
    ],
)
def test_settings_without_effect_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        choose_decoding(DecodingConfig(), given)


def test_what_is_given_goes_before_what_is_saved():
    saved = DecodingConfig(num_beams=5, length_penalty=0.8, max_new_tokens=67)
    assert choose_decoding(saved, {"seed": None}) == saved
    assert choose_decoding(saved, {"num_beams": 1}) == DecodingConfig(max_new_tokens=67)
    assert choose_decoding(saved, {"max_new_tokens": 9}).num_beams == 5
    # An evaluation names its way, and the saved penalty is none of it.
    assert choose_decoding(saved, {"decoding": "search", "num_beams": 5}).length_penalty is None
    assert choose_decoding(saved, {"decoding": "sample", "top_k": 3}).describe() == "sample, temperature 1, top_k 3, seed 0"
    assert saved.describe() == "beam 5, length penalty 0.8" and DecodingConfig().describe() == "greedy"
    assert "beam 5" in DecodingConfig(decoding="paper").describe()


@pytest.mark.parametrize("kind", ["bpe", "sp"])
def test_captions_end_as_asked(kind):
    tok = tokenizer(kind, image=False)
    texts = ["a red dog .", "two big circles"]
    eos, stop = tok.eos_token_id, period_token(tok)
    plain = tok(["a red dog", "two big circles"], add_special_tokens=False)["input_ids"]
    assert caption_ids(tok, texts, end="period", max_length=20) == [[*ids, stop] for ids in plain]
    as_they_are = tok(texts, add_special_tokens=False)["input_ids"]
    assert caption_ids(tok, texts, end="none", max_length=20) == as_they_are
    assert caption_ids(tok, texts, end="eos", max_length=20) == [[*ids, eos] for ids in as_they_are]
    assert caption_ids(tok, texts, end="eos", max_length=3) == [[*ids[:2], eos] for ids in as_they_are]
    assert (end_token(tok, "eos"), end_token(tok, "period"), end_token(tok, "none")) == (eos, stop, stop)
    # Neither start token nor any other special one: the prefix stands in its place.
    assert tok.bos_token_id not in as_they_are[0]


def test_a_tokenizer_without_an_end_token_needs_another_end():
    tok = tokenizer("bpe", image=False)
    tok.eos_token = None
    with pytest.raises(InputError, match=r"caption_end: this tokenizer has no end token; use caption_end: period"):
        caption_ids(tok, ["a dog"], end="eos", max_length=5)
    ids = caption_ids(tok, ["a dog"], end="period", max_length=5)
    model = make(tok=tok)
    assert model.lm.generation_config.eos_token_id is None
    model.lm.generation_config.eos_token_id = end_token(tok, "period")
    assert stop_tokens(model, tok, DecodingConfig()) == [ids[0][-1]]
    assert len(write_captions(model, tok, features(2), DecodingConfig(max_new_tokens=4))) == 2


@pytest.mark.parametrize("way", ["greedy", "paper"])
def test_texts_end_at_their_stop_and_fill_is_not_shown(way, monkeypatch):
    tok = tokenizer("bpe", image=False)
    model = make(tok=tok)
    stop = period_token(tok)
    model.lm.generation_config.eos_token_id = stop
    model.lm.generation_config.pad_token_id = None
    how = DecodingConfig(max_new_tokens=6, **WAYS[way])
    word = tok("a red", add_special_tokens=False)["input_ids"]
    rows = torch.tensor([[*word, stop, stop, stop], [*word, *word, word[0]]])
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: rows)
    texts = write_captions(model, tok, features(2), how)
    assert texts[0] == "a red." and "." not in texts[1]


def test_the_folder_says_how_captions_are_written(tmp_path):
    tok = tokenizer("bpe", image=False)
    model = make(tok=tok)
    model.lm.generation_config.eos_token_id = 42
    ways = {
        "paper": ({"decoding": "paper", "max_new_tokens": 67}, {"num_beams": 5}),
        "sample": ({"decoding": "sample", "top_p": 0.9, "seed": 4}, {"do_sample": True, "top_p": 0.9, "top_k": 0}),
        "beam": ({"num_beams": 4, "length_penalty": 0.5}, {"num_beams": 4, "length_penalty": 0.5}),
    }
    for name, (keys, written) in ways.items():
        save_captioner(model, tok, tmp_path / name, meta={}, decoding=DecodingConfig(**keys))
        again, _, meta = load_captioner(tmp_path / name)
        assert DecodingConfig(**meta["decoding"]) == DecodingConfig(**keys)
        plain = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert {k: plain.get(k) for k in written} == written and plain["eos_token_id"] == [42]
        assert stop_ids(again.lm) == [42] and not again.lm.generation_config.do_sample
