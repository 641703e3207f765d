from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from mmkit.config import DecodingConfig
from mmkit.errors import InputError
from mmkit.models.clipcap import ClipCap, build_clipcap, load_captioner, save_captioner
from mmkit.models.mappers import FeatureNorm, MLPMapper, TransformerMapper

from .tiny import gpt2, llama, tokenizer


def make(mapper="mlp", **more):
    settings = {"feature_dim": 12, "prefix_length": 4, "clip_length": 3, "mapper_layers": 2, "mapper_heads": 4}
    return build_clipcap(gpt2(tokenizer("bpe", image=False)), mapper=mapper, **{**settings, **more})


def batch(lengths=(5, 3, 1), vocab=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    return torch.randn(len(lengths), 12, generator=generator), ids, mask, labels


@pytest.mark.parametrize(("dim", "length", "count"), [(512, 10, 31_468_800)])
def test_mlp_has_the_published_number_of_parameters(dim, length, count):
    with torch.device("meta"):
        mapper = MLPMapper(dim, 768, length)
    assert sum(p.numel() for p in mapper.parameters()) == count


@pytest.mark.parametrize(
    ("dim", "length", "count"),
    [(512, 10, 41_745_408), (640, 10, 42_728_448), (512, 40, 53_587_968), (640, 40, 57_520_128)],
)
def test_transformer_has_the_published_number_of_parameters(dim, length, count):
    with torch.device("meta"):
        mapper = TransformerMapper(dim, 768, length, clip_length=length, tokens=False, layers=8, heads=8)
    assert sum(p.numel() for p in mapper.parameters()) == count


def slow_transformer(mapper, features):
    """The published mapper written out for one row at a time, softmax and all."""
    rows = []
    for row in features:
        x = torch.cat([mapper.linear(row).reshape(mapper.clip_length, -1), mapper.prefix_const])
        for block in mapper.layers:
            y = block.norm1(x)
            heads, width = block.attn.heads, y.shape[1] // block.attn.heads
            q = block.attn.to_queries(y).reshape(-1, heads, width)
            kv = block.attn.to_keys_values(y).reshape(-1, 2, heads, width)
            scores = torch.einsum("nhd,mhd->nmh", q, kv[:, 0]) * width**-0.5
            mixed = torch.einsum("nmh,mhd->nhd", scores.softmax(dim=1), kv[:, 1])
            x = x + block.attn.project(mixed.reshape(len(x), -1))
            x = x + block.mlp(block.norm2(x))
        rows.append(x[mapper.clip_length :])
    return torch.stack(rows)


def test_transformer_mapper_equals_its_slow_twin():
    torch.manual_seed(0)
    mapper = TransformerMapper(12, 32, 4, clip_length=3, tokens=False, layers=2, heads=4)
    features = torch.randn(2, 12)
    torch.testing.assert_close(mapper(features), slow_transformer(mapper, features), rtol=1e-5, atol=1e-5)
    assert mapper.prefix_const.std() > 0.7, "constants are drawn from N(0, 1)"


def test_feature_norms():
    features = torch.tensor([[3.0, 4.0], [5.0, 4.0]])
    assert torch.equal(FeatureNorm("none", 2)(features), features)
    torch.testing.assert_close(FeatureNorm("l2", 2)(features).norm(dim=-1), torch.ones(2))
    norm = FeatureNorm("standardize", 2)
    norm.fit(features)
    # The second number is constant: centred, not blown up.
    torch.testing.assert_close(norm(features), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))


@pytest.mark.parametrize("shape", [(700, 5), (300, 3, 5)])
def test_statistics_taken_in_parts_are_those_of_the_whole(shape):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6) + 1000
    spoiled = features.clone()
    # An unreadable picture in the first part, and a part of nothing else.
    spoiled[3] = float("nan")
    spoiled[256:] = torch.where(
        torch.arange(len(spoiled) - 256).view(-1, *[1] * (len(shape) - 1)) < 30, float("nan"), features[256:]
    )
    kept = ~spoiled.flatten(1).isnan().any(1)
    norm = FeatureNorm("standardize", 5)
    norm.fit(spoiled)
    rows = features[kept].reshape(-1, 5).double()
    torch.testing.assert_close(norm.feature_mean, rows.mean(0).float())
    torch.testing.assert_close(norm.feature_std, rows.std(0, correction=0).float())


@pytest.mark.parametrize("mapper", ["mlp", "transformer"])
@pytest.mark.parametrize("lm", [gpt2, llama])
def test_loss_and_gradient_equal_the_language_models_own(mapper, lm):
    tok = tokenizer("bpe", image=False)
    model = build_clipcap(lm(tok), feature_dim=12, mapper=mapper, prefix_length=4, mapper_layers=1, mapper_heads=4)
    features, ids, mask, labels = batch()
    out = model(features, ids, mask, labels)
    out.loss_sum.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    prefix = model.prefix(features)
    embeds = torch.cat([prefix, model.get_input_embeddings()(ids)], dim=1)
    full = torch.cat([torch.full((3, 4), -100), labels], dim=1)
    twin = model.lm(inputs_embeds=embeds, attention_mask=torch.cat([torch.ones(3, 4).long(), mask], 1), labels=full)
    count = (labels != -100).sum()
    assert out.num_tokens == count == 9
    torch.testing.assert_close(out.loss_sum, twin.loss * count, rtol=1e-5, atol=1e-5)
    (twin.loss * count).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_padding_changes_nothing_and_id_zero_is_learnt():
    model = make()
    features, ids, mask, labels = batch((4, 2))
    ids[0, 0] = labels[0, 0] = 0
    whole = model(features, ids, mask, labels)
    noise = torch.where(mask == 1, ids, torch.full_like(ids, 7))
    assert torch.equal(model(features, noise, mask, labels).loss_sum, whole.loss_sum)
    alone = [
        model(features[i : i + 1], ids[i : i + 1, :n], mask[i : i + 1, :n], labels[i : i + 1, :n]).loss_sum
        for i, n in enumerate((4, 2))
    ]
    torch.testing.assert_close(sum(alone), whole.loss_sum)
    assert whole.num_tokens == 6
    assert whole.logits.shape == (6, model.config.lm_config.vocab_size)


def test_logits_without_labels_are_those_of_all_positions():
    model = make()
    features, ids, mask, _ = batch((3, 3))
    out = model(features, ids, mask)
    assert out.num_tokens == 0
    expected = F.cross_entropy(out.logits, ids.flatten(), reduction="sum")
    torch.testing.assert_close(model(features, ids, mask, ids).loss_sum, expected)


def test_only_mapper_freezes_the_language_model_and_its_dropout():
    model = make(only_mapper=True).train()
    assert model.mapper.training
    assert not model.lm.training
    assert not any(module.training for module in model.lm.modules())
    names = [name for name, _ in model.trainable_parameters()]
    assert names
    assert all(name.startswith("mapper.") for name in names)
    features, ids, mask, labels = batch()
    model(features, ids, mask, labels).loss_sum.backward()
    assert all(p.grad is None for p in model.lm.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.mapper.parameters())
    model.set_only_mapper(False)
    assert model.lm.training
    assert any(name.startswith("lm.") for name, _ in model.trainable_parameters())


def test_building_leaves_the_language_model_as_it_was():
    lm = gpt2()
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    model = build_clipcap(lm, feature_dim=12, prefix_length=4)
    assert model.lm is lm
    assert all(torch.equal(value, before[name]) for name, value in model.lm.state_dict().items())


def test_same_seed_same_mapper():
    first, again, other = make(seed=3), make(seed=3), make(seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.mapper.parameters(), again.mapper.parameters(), strict=True))
    assert not torch.equal(first.mapper.layers[0].weight, other.mapper.layers[0].weight)


def test_patch_tokens_go_through_the_transformer_mapper():
    model = make("transformer", feature_kind="tokens")
    features = torch.randn(2, 9, 12)
    assert model.prefix(features).shape == (2, 4, 32)
    assert model.mapper.linear.out_features == 32
    # Attention sees every patch: moving one changes the prefix; their order does not (no positions).
    torch.testing.assert_close(model.prefix(features.flip(1)), model.prefix(features), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="tokens"):
        model.prefix(features[:, 0])
    with pytest.raises(InputError, match="transformer"):
        make("mlp", feature_kind="tokens")


@pytest.mark.parametrize("choice", [{"mapper": "mpl"}, {"feature_kind": "patches"}, {"feature_norm": "l3"}])
def test_unknown_choices_name_the_known_ones(choice):
    with pytest.raises(InputError, match="use one of"):
        make(**choice)


@pytest.mark.parametrize(("mapper", "norm"), [("mlp", "standardize"), ("transformer", "l2")])
def test_save_and_load_give_the_same_model(mapper, norm, tmp_path):
    tok = tokenizer("bpe", image=False)
    model = make(mapper, feature_norm=norm, only_mapper=True)
    if norm == "standardize":
        model.norm.fit(torch.randn(20, 12) * 3 + 1)
    meta = {"encoder": {"path": "encoder", "fingerprint": "abc"}}
    save_captioner(model, tok, tmp_path, meta=meta, decoding=DecodingConfig(max_new_tokens=5))
    again, tok2, meta2 = load_captioner(tmp_path)
    assert meta2 == {"kind": "captioner", **meta, "decoding": {"max_new_tokens": 5, "decoding": "search", "num_beams": 1}}
    assert not again.training
    assert again.config.only_mapper
    assert not any(p.requires_grad for p in again.lm.parameters())
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert again.lm.get_output_embeddings().weight is again.lm.get_input_embeddings().weight, "GPT-2's head is tied"
    features, ids, mask, labels = batch()
    assert torch.equal(again(features, ids, mask, labels).logits, model(features, ids, mask, labels).logits)
    five = DecodingConfig(max_new_tokens=5)
    assert torch.equal(again.generate(features, five), model.generate(features, five))
    assert tok2("a red dog").input_ids == tok("a red dog").input_ids


def test_an_untied_language_model_survives_saving(tmp_path):
    tok = tokenizer("sp", image=False)
    model = build_clipcap(llama(tok), feature_dim=12, prefix_length=4)
    save_captioner(model, tok, tmp_path, meta={}, decoding=DecodingConfig())
    again, _, _ = load_captioner(tmp_path)
    assert torch.equal(again.lm.lm_head.weight, model.lm.lm_head.weight)
    assert type(again.lm) is type(AutoModelForCausalLM.from_config(model.lm.config))


def test_loading_another_kind_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_captioner(tmp_path)
    (tmp_path / "mmkit.json").write_text('{"kind": "mllm"}')
    with pytest.raises(InputError, match="mllm"):
        load_captioner(tmp_path)


def test_bfloat16_language_model_with_a_float32_loss():
    tok = tokenizer("bpe", image=False)
    lm = gpt2(tok).to(torch.bfloat16)
    model = ClipCap(make().config, lm=lm)
    out = model(*batch())
    assert out.loss_sum.dtype == torch.float32
    assert out.logits.dtype == torch.bfloat16
