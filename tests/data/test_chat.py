from __future__ import annotations

import gc
import weakref

import pytest
from chats import CASES, CHATML, LLAMA3_TOKENS, QWEN25, SHAPES, chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from models.tiny import tokenizer
from PIL import Image
from transformers import AutoProcessor

from mmkit.data.chat import original_template, own_template
from mmkit.data.conversations import chat_template, encode_conversation, encode_prompt, stop_tokens
from mmkit.data.pieces import ConversationError
from mmkit.errors import InputError
from mmkit.models.processor import build_processor

TURNS = [("What is this?", "a red circle."), ("how many dogs", "It's 3, not 12!"), ("Describe the picture.", "USER: hi")]
# Llama 3's template writes the date; mmkit keeps it fixed, or tomorrow's sequence would be another one.
FIXED = {"date_string": "26 Jul 2024", "enable_thinking": False}
NO_SYSTEM = ("mistral", "gemma")


def how(made, images=0):
    return {"num_images": images, "tokens_per_image": 4, "image_token_id": made.convert_tokens_to_ids("<image>")}


def encode(turns, made, *, images=0, max_length=4096, system=None):
    return encode_conversation(turns, made, "chat", max_length=max_length, system=system, **how(made, images))


def chat(turns, shape, system=None):
    rows = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        rows += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rows = [row for row in rows if row["content"] is not None]
    return [{**row, "content": [{"type": "text", "text": row["content"]}]} for row in rows] if shape == "parts" else rows


def spans(out):
    """Supervised stretches."""
    found, span = [], []
    for label in [*out.labels, -100]:
        if label != -100:
            span.append(label)
        elif span:
            found, span = [*found, span], []
    return found


def with_every_thought(made, rows):
    """Ids of a chat with the empty thought before all answers, where the template writes it before the last one only."""
    text = made.apply_chat_template(rows, tokenize=False, **FIXED)
    thought = "<think>\n\n</think>\n\n"
    opening = "<|im_start|>assistant\n"
    return made(text.replace(thought, "").replace(opening, opening + thought), add_special_tokens=False).input_ids


def test_every_answer_is_learnt_behind_what_opens_one_in_generation():
    made = chat_tokenizer("qwen3", "bpe")
    whole, alone = encode(TURNS, made), encode(TURNS[:1], made)
    # The first answer of several: the same prompt as when it is the only one, which is the prompt that is asked with.
    prompt = encode_prompt(TURNS[0][0], made, "chat", **how(made))
    assert whole.input_ids[: len(prompt)] == prompt and whole.labels[: len(prompt)] == [-100] * len(prompt)
    assert spans(whole)[0] == spans(alone)[0]
    text = made.decode(whole.input_ids)
    assert text.count("<think>") == text.count("<|im_start|>assistant") == len(TURNS)
    assert "<think>" not in made.decode([i for span in spans(whole) for i in span])


@pytest.mark.parametrize(("shape", "kind"), CASES)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_ids_are_those_of_apply_chat_template(shape, kind, count, system):
    if system and shape in NO_SYSTEM:
        return
    made = chat_tokenizer(shape, kind)
    turns = TURNS[:count]
    ids = made.apply_chat_template(chat(turns, shape, system), return_dict=False, **FIXED)
    if shape == "qwen3":
        ids = with_every_thought(made, chat(turns, shape, system))
    out = encode(turns, made, system=system)
    assert out.input_ids == ids
    assert not out.cut
    end = SHAPES[shape][-1] or made.eos_token
    assert [span[-1] for span in spans(out)] == [made.convert_tokens_to_ids(end)] * count
    said = [made.decode(span[:-1]) for span in spans(out)]
    # Qwen3's empty thought belongs to the prompt.
    assert [text.strip() for text in said] == [answer for _, answer in turns]
    assert out.num_supervised == sum(map(len, spans(out)))
    asked = chat([(turns[0][0], None)], shape, system)
    asked = made.apply_chat_template(asked, add_generation_prompt=True, return_dict=False, **FIXED)
    prompt = encode_prompt(turns[0][0], made, "chat", system=system, **how(made))
    assert prompt == asked
    assert out.input_ids[: len(prompt)] == prompt
    assert out.labels[len(prompt)] == out.input_ids[len(prompt)]


@pytest.mark.parametrize("shape", NO_SYSTEM)
def test_a_system_text_goes_before_the_question_where_the_template_has_no_place_for_it(shape):
    made = chat_tokenizer(shape, "sp")
    folded = [("Be brief.\n\nWhat is this?", "a red circle."), TURNS[1]]
    assert encode(TURNS[:2], made, system="Be brief.").input_ids == encode(folded, made).input_ids
    pictured = [("<image>\nBe brief.\n\nWhat is this?", "a dog")]
    turns = [("What is this? <image>", "a dog")]
    assert encode(turns, made, images=1, system="Be brief.").input_ids == encode(pictured, made, images=1).input_ids


def processor(made):
    return build_processor(made, image_size=32, patch_size=16, mean=(0.5,) * 3, std=(0.5,) * 3, template="chat")


MESSAGES = {
    "front": ([{"type": "image"}, {"type": "text", "text": "What is this?"}], "<image>\nWhat is this?"),
    "back": ([{"type": "text", "text": "What is this?"}, {"type": "image"}], "What is this? <image>"),
    "alone": ([{"type": "image"}], "<image>"),
    "two": ([{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}], "<image>\n<image>\nWhich?"),
    "mixed": (
        [{"type": "text", "text": "This "}, {"type": "image"}, {"type": "text", "text": "or "}, {"type": "image"}],
        "This <image>\nor <image>",
    ),
    "text": ("  What is this? ", "What is this?"),
}


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_the_processors_template_gives_the_ids_of_the_prompt(shape, kind, tmp_path):
    made = chat_tokenizer(shape, kind)
    first = processor(made)
    first.save_pretrained(tmp_path)
    picture = Image.new("RGB", (20, 20))
    for opened in (first, AutoProcessor.from_pretrained(tmp_path)):
        for content, question in MESSAGES.values():
            images = question.count("<image>")
            for system in (None, "Be brief."):
                rows = [{"role": "system", "content": system}] if system else []
                rows.append({"role": "user", "content": content})
                text = opened.apply_chat_template(rows, add_generation_prompt=True)
                ids = opened(text=text, images=[picture] * images or None).input_ids[0]
                expected = encode_prompt(question, made, "chat", system=system, **how(made, images))
                assert list(ids) == expected, (content, system)
    shown = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]}]
    batch = opened.apply_chat_template(shown, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert list(batch["input_ids"][0]) == encode_prompt("What is this?", made, "chat", **how(made, 1))
    assert len(batch["pixel_values"]) == 1
    whole = [*rows, {"role": "assistant", "content": "a dog"}]
    rows = opened.tokenizer(opened.apply_chat_template(whole)).input_ids
    assert rows == encode([("What is this?", "a dog")], made, system="Be brief.").input_ids


@pytest.mark.parametrize("shape", ["llama3", "phi3", "gemma", "parts", "qwen3"])
def test_a_template_that_was_extended_is_not_extended_twice(shape):
    made = chat_tokenizer(shape, CASES[[s for s, _ in CASES].index(shape)][1])
    before, source = made.chat_template, chat_template("chat", made)
    assert original_template(source) == original_template(before) == before
    made.chat_template = source
    assert chat_template("chat", made) == source
    rendered = made.apply_chat_template(chat(TURNS[:1], ""), tokenize=False)
    made.chat_template = before
    assert rendered == made.apply_chat_template(chat(TURNS[:1], shape), tokenize=False, **FIXED)


def test_white_space_at_the_beginning_of_a_template_stays():
    made = chat_tokenizer("smollm", "bpe")
    for head in ("\n", "  ", " \n\n", "  {% set a = 1 %}\n  {{- '' }}\n "):
        made.chat_template = head + QWEN25
        expected = made.apply_chat_template(chat(TURNS, ""), return_dict=False)
        assert encode(TURNS, made).input_ids == expected
        text = made.apply_chat_template(chat(TURNS, ""), chat_template=chat_template("chat", made), tokenize=False)
        assert text == made.apply_chat_template(chat(TURNS, ""), tokenize=False)


SPELLED = ["</s>", "<s>", "<unk>", "<|endoftext|>", *CHATML, *LLAMA3_TOKENS, "<|end|>", "<end_of_turn>", "[/INST]", " [INST] "]
SPELLED += ["<think>", "</think>", "<image>", "ASSISTANT:", "\U00100000", "{{ bos_token }}", "\n\n"]
PIECES = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(SPELLED)), max_size=4).map("".join)
TEXTS = PIECES.map(lambda text: text.encode("utf-8", "replace").decode("utf-8"))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(CASES), st.lists(st.tuples(TEXTS, TEXTS.map("x{}".format)), min_size=1, max_size=3), st.booleans())
def test_whatever_the_texts_spell_only_the_template_writes_control_tokens(case, turns, pictured):
    made = chat_tokenizer(*case)
    turns = [(q.replace("<image>", "<i>"), a) for q, a in turns] if pictured else turns
    turns = [(f"<image>\n{turns[0][0]}", turns[0][1]), *turns[1:]] if pictured else turns
    try:
        out = encode(turns, made, images=int(pictured))
    except ConversationError as error:
        # Qwen3's template looks for a thought in an answer.
        if "rewrites" in error.reason:
            assert case[0] == "qwen3"
            assert "</think>" in "".join(answer for _, answer in turns)
        else:
            assert "cannot keep" in error.reason
        return
    asked = encode_prompt(turns[0][0], made, "chat", **how(made, int(pictured)))
    assert out.input_ids[: len(asked)] == asked
    assert out.labels[: len(asked)] == [-100] * len(asked)
    assert out.labels[len(asked)] != -100
    blank = encode([("<image>\nq" if pictured and i == 0 else "q", "a") for i in range(len(turns))], made, images=int(pictured))
    special = {t for t, token in made.added_tokens_decoder.items() if token.special} | {
        made.convert_tokens_to_ids(t) for t in own_template(made).added
    }
    special -= {made.unk_token_id} - {made.eos_token_id}
    assert [i for i in out.input_ids if i in special] == [i for i in blank.input_ids if i in special]
    assert len(out.input_ids) == len(out.labels)
    for span, (_, answer) in zip(spans(out), turns, strict=True):
        text = made.decode(span[:-1])
        assert text.replace(" ", "").strip() == made.decode(own_ids(made, answer.strip())).replace(" ", "").strip()


def own_ids(made, text):
    """Ids of a text whose special tokens are text; for what a tokenizer's normaliser makes of odd characters."""
    backend = type(made.backend_tokenizer).from_str(made.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    return backend.encode(text, add_special_tokens=False).ids


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(CASES), st.integers(1, 120), st.booleans())
def test_cutting_keeps_whole_pictures_and_at_least_one_label(case, max_length, late):
    made = chat_tokenizer(*case)
    turns = [("how many", "three dogs"), ("<image> or <image>?", "the red one"), ("<image>", "two")]
    turns = turns if late else turns[1:]
    whole = encode(turns, made, images=3)
    try:
        out = encode(turns, made, images=3, max_length=max_length)
    except ConversationError as error:
        assert error.reason == f"no answer token fits {max_length} tokens"
        return
    assert len(out.input_ids) <= max_length
    assert out.input_ids == whole.input_ids[: len(out.input_ids)]
    assert out.num_supervised > 0
    assert out.input_ids.count(made.convert_tokens_to_ids("<image>")) == 4 * out.num_images
    assert out.num_images in ((0, 2, 3) if late else (2, 3))
    assert out.cut == (out.num_supervised < whole.num_supervised)


def test_what_a_template_rewrites_is_left_out_by_name():
    made = chat_tokenizer("qwen3", "bpe")
    with pytest.raises(ConversationError, match="rewrites the assistant text"):
        encode([("q", "<think>\nhm\n</think>\n\n42")], made)
    with pytest.raises(ConversationError, match="chat template"):
        encode([("q", "a"), ("<tool_response>q", "a")], made)
    assert encode([("<tool_response>q", "a"), ("q", "a")], made).num_supervised > 0
    assert encode([("q", "<think> alone")], made).num_supervised > 0


def test_a_template_that_cannot_take_so_many_turns_leaves_the_conversation_out():
    made = tokenizer("sp")
    body = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    made.chat_template = body + "{% if messages | length > 4 %}{{ raise_exception('too long') }}{% endif %}"
    assert encode(TURNS[:2], made).num_supervised > 0
    with pytest.raises(ConversationError, match="cannot take 3 turns: it too long"):
        encode(TURNS, made)
    made.chat_template = body.replace("+ eos_token", "+ (eos_token if messages | length < 5 else ';')")
    with pytest.raises(ConversationError, match="does not end answer 1"):
        encode(TURNS, made)


UNFIT = {
    "{% for m in messages %}{{ m['content'] | upper + eos_token }}{% endfor %}": "cannot write plain texts",
    "{% for m in messages %}{{ m['content'] }}{% endfor %}": "no control token after an answer",
    "{% for m in messages if m['role'] == 'user' %}{{ m['content'] + eos_token }}{% endfor %}": "every message once",
    "{% for m in messages %}{{ m['content'] + m['content'] + eos_token }}{% endfor %}": "every message once",
    "{{ raise_exception('no chats') }}": "no chats",
    "{{ nothing.at.all }}": "undefined",
    "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}": (
        "opens an answer with"
    ),
    "{% for m in messages %}{{ m['content'][:40] + eos_token }}{% endfor %}{{ 1 if messages[-1]['content'] == 'a dog' }}": (
        "plain texts"
    ),
}


def test_a_question_that_a_template_rewrites_cannot_be_asked():
    made = tokenizer("sp")
    made.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'].replace('!', '.') + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert encode_prompt("What?", made, "chat", **how(made))
    with pytest.raises(InputError, match=r"'Look!': cannot be asked: the chat template rewrites the user text"):
        encode_prompt("Look!", made, "chat", **how(made))


@pytest.mark.parametrize("template", UNFIT)
def test_a_template_that_cannot_be_followed_is_refused(template):
    made = tokenizer("sp")
    made.chat_template = template
    with pytest.raises(InputError, match=UNFIT[template]) as caught:
        encode(TURNS, made)
    assert "choose another conversation template" in str(caught.value)


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(InputError, match="has no chat template"):
        encode(TURNS, tokenizer("bpe"))
    made = tokenizer("bpe")
    made.chat_template = {"rag": QWEN25, "tools": QWEN25}
    with pytest.raises(InputError, match="several chat templates"):
        encode(TURNS, made)
    made.chat_template = {"rag": "{{ nothing }}", "default": SHAPES["zephyr"][0]}
    assert encode(TURNS, made).num_supervised > 0


def test_generation_stops_at_the_end_of_a_turn():
    made = chat_tokenizer("llama3", "bpe")
    assert stop_tokens("chat", made) == [made.convert_tokens_to_ids("<|eot_id|>"), made.eos_token_id]
    assert stop_tokens("vicuna_v1", made) == [made.eos_token_id]
    assert stop_tokens("plain", made) == [made.eos_token_id]
    assert stop_tokens("chatml", tokenizer("bpe", chatml=True)) == [332, 0]


def test_a_tokenizer_that_nobody_uses_is_forgotten():
    made = chat_tokenizer("gemma", "sp")
    encode(TURNS, made)
    gone = weakref.ref(made)
    del made
    gc.collect()
    assert gone() is None
