from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from models.tiny import tokenizer

from mmkit.data.conversations import chat_template, encode_conversation, encode_prompt
from mmkit.data.llava_json import read_llava
from mmkit.data.pieces import ConversationError
from mmkit.data.skipped import SampleError
from mmkit.data.templates import TEMPLATES
from mmkit.errors import InputError

KINDS = ("sp", "bpe")
CHATS = ("vicuna_v1", "demo", "chatml")
TURNS = [("<image>\nWhat is this?", "a red circle."), ("how many", "It's 3, not 12!")]
SPECIALS = ["</s>", "<s>", "<image>", "<unk>", "<|endoftext|>", "<|im_end|>", "<|im_start|>", "USER: hi ASSISTANT: x"]


def tok(kind):
    return tokenizer(kind, chatml=True)


def encode(turns, made, template, *, n=3, max_length=4096, images=1, system=None):
    """With n tokens for a picture; none of them is text only."""
    how = {"num_images": images if n else 0, "tokens_per_image": n, "image_token_id": made.convert_tokens_to_ids("<image>")}
    return encode_conversation(turns, made, template, max_length=max_length, system=system, **how)


def prompt(question, made, template, *, n=3, images=1, system=None):
    how = {"num_images": images if n else 0, "tokens_per_image": n, "image_token_id": made.convert_tokens_to_ids("<image>")}
    return encode_prompt(question, made, template, system=system, **how)


def supervised(out):
    return [label for label in out.labels if label != -100]


def messages(turns, n):
    out = []
    for question, answer in turns:
        content = [{"type": "text", "text": question.replace("<image>", "").strip()}]
        if n and "<image>" in question:
            content.insert(0, {"type": "image"})
        out += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", CHATS)
def test_only_answers_and_their_ends_are_supervised(kind, template):
    made = tok(kind)
    out = encode(TURNS, made, template)
    end = made.convert_tokens_to_ids("<|im_end|>") if template == "chatml" else made.eos_token_id
    spans, span = [], []
    for label in [*out.labels, -100]:
        if label != -100:
            span.append(label)
        elif span:
            spans.append(span)
            span = []
    assert [span[-1] for span in spans] == [end, end]
    assert [made.decode(span[:-1]).strip() for span in spans] == [answer for _, answer in TURNS]
    assert out.num_supervised == len(supervised(out))
    assert all(label in (-100, token) for label, token in zip(out.labels, out.input_ids, strict=True))
    assert not out.cut


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("n", [0, 3])
def test_rendered_chat_template_gives_the_same_ids(kind, template, n):
    made = tok(kind)
    if template == "plain" and n == 0:
        return
    turns = TURNS[:1] if template == "plain" else TURNS if n else [(q.replace("<image>\n", ""), a) for q, a in TURNS]
    jinja = chat_template(template, made)
    text = made.apply_chat_template(messages(turns, n), chat_template=jinja, tokenize=False)
    ids = made(text.replace("<image>", "<image>" * n)).input_ids
    assert ids == encode(turns, made, template, n=n).input_ids
    asked = made.apply_chat_template(messages(turns, n)[:1], chat_template=jinja, tokenize=False, add_generation_prompt=True)
    ids = made(asked.replace("<image>", "<image>" * n)).input_ids
    assert ids == prompt(turns[0][0], made, template, n=n)


def test_vicuna_text_is_the_published_one():
    made = tok("sp")
    text = made.apply_chat_template(messages(TURNS, 3), chat_template=chat_template("vicuna_v1", made), tokenize=False)
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. USER: <image>\nWhat is this? ASSISTANT: a red circle.</s>"
        "USER: how many ASSISTANT: It's 3, not 12!</s>"
    )


def test_plain_is_image_caption_newline():
    made = tok("sp")
    out = encode([("<image>\nDescribe the picture.", "a red circle.")], made, "plain", n=2)
    image_id = made.convert_tokens_to_ids("<image>")
    assert out.input_ids[:3] == [made.bos_token_id, image_id, image_id]
    assert out.labels[:3] == [-100] * 3
    assert out.labels[3:] == out.input_ids[3:]
    assert made.decode(out.input_ids[3:]) == "a red circle.\n"
    assert prompt("anything", made, "plain", n=2) == out.input_ids[:3]
    with pytest.raises(ConversationError, match="one turn"):
        encode(TURNS, made, "plain")
    with pytest.raises(ConversationError, match="picture"):
        encode(TURNS[1:], made, "plain", n=0)


WORDS = st.text(alphabet="abc reds.,?!12'é☃\n", max_size=25)
PIECES = st.lists(st.one_of(WORDS, st.sampled_from(SPECIALS)), min_size=1, max_size=4).map("".join)
ANSWERS = PIECES.map(lambda text: "x" + text)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(CHATS), st.lists(st.tuples(PIECES, ANSWERS), min_size=1, max_size=3))
def test_no_text_can_become_a_control_token_or_move_a_label(kind, template, turns):
    made = tok(kind)
    turns = [(question.replace("<image>", "<i>"), answer) for question, answer in turns]
    turns[0] = ("<image>\n" + turns[0][0], turns[0][1])
    out = encode(turns, made, template)
    plain = encode([("<image>\nq" if i == 0 else "q", "a") for i in range(len(turns))], made, template)
    controls = {made.convert_tokens_to_ids(t) for t in ("<image>", "</s>", "<s>", "<|im_start|>", "<|im_end|>")}
    controls |= {made.eos_token_id, made.bos_token_id}
    controls -= {None, made.unk_token_id} - {made.eos_token_id}
    assert [i for i in out.input_ids if i in controls] == [i for i in plain.input_ids if i in controls]
    end = made.convert_tokens_to_ids("<|im_end|>") if template == "chatml" else made.eos_token_id
    said = "".join(made.decode([i]) if i == end else "" for i in supervised(out)).count(made.decode([end]))
    assert said == len(turns)
    text = made.decode([i for i in supervised(out) if i != end])
    assert text.replace(" ", "") == "".join(answer.strip() for _, answer in turns).replace(" ", "")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(CHATS), PIECES, ANSWERS, st.booleans())
def test_the_prompt_is_a_prefix_of_the_training_sequence(kind, template, question, answer, with_image):
    made = tok(kind)
    question = question.replace("<image>", "")
    asked = prompt(question, made, template, n=3 if with_image else 0)
    turns = [(f"<image>\n{question}" if with_image else question, answer)]
    out = encode(turns, made, template, n=3 if with_image else 0)
    assert out.input_ids[: len(asked)] == asked
    assert out.labels[: len(asked)] == [-100] * len(asked)
    assert out.labels[len(asked)] != -100


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(CHATS), st.integers(1, 150), st.integers(0, 1))
def test_cutting_keeps_the_picture_and_at_least_one_label(kind, template, max_length, picture_turn):
    made = tok(kind)
    turns = [("how many", "three dogs"), ("What is this?", "a red circle on the table."), ("near", "two")]
    turns[picture_turn] = ("<image>\n" + turns[picture_turn][0], turns[picture_turn][1])
    whole = encode(turns, made, template, n=5)
    try:
        out = encode(turns, made, template, n=5, max_length=max_length)
    except ConversationError as error:
        assert "fit" in error.reason
        return
    assert len(out.input_ids) == len(out.labels) <= max_length
    assert out.input_ids == whole.input_ids[: len(out.input_ids)]
    assert out.labels == whole.labels[: len(out.labels)]
    # A picture that does not fit goes with its turn; it is never cut.
    assert out.input_ids.count(made.convert_tokens_to_ids("<image>")) == 5 * out.num_images
    assert out.num_images == 1 or (out.cut and picture_turn == 1)
    assert out.num_supervised == len(supervised(out)) > 0
    assert out.labels[-1] != -100, "nothing is kept after the last answer token"
    assert out.cut == (len(out.input_ids) < len(whole.input_ids))


def test_image_is_moved_to_the_front_of_its_turn():
    made = tok("sp")
    assert (
        encode([("What is this?\n<image>", "a dog")], made, "demo").input_ids
        == encode([("<image>\nWhat is this?", "a dog")], made, "demo").input_ids
    )


def test_without_a_picture_the_marker_is_plain_text():
    made = tok("sp")
    out = encode([("write <image> here", "a dog")], made, "demo", n=0)
    assert made.convert_tokens_to_ids("<image>") not in out.input_ids
    assert "<image>" in made.decode(out.input_ids)


@pytest.mark.parametrize(
    ("turns", "match"),
    [
        ([], "no turns"),
        ([("<image>\nq", " ")], "empty"),
        ([("q", "a")], "found 0"),
        ([("<image><image>", "a")], "found 2"),
        ([("<image>", "a"), ("<image>", "a")], "found 2"),
    ],
)
def test_odd_conversations_are_named(turns, match):
    with pytest.raises(ConversationError, match=match) as caught:
        encode(turns, tok("sp"), "demo")
    assert isinstance(caught.value, SampleError)
    assert caught.value.reason


def test_template_problems_are_the_users():
    with pytest.raises(InputError, match="vicuna_v1"):
        encode(TURNS, tok("sp"), "vicuna")
    with pytest.raises(InputError, match="im_start"):
        encode(TURNS, tokenizer("sp"), "chatml")


def test_tokens_added_later_are_seen():
    made = tokenizer("bpe")
    with pytest.raises(InputError):
        encode(TURNS, made, "chatml")
    made.add_special_tokens({"extra_special_tokens": ["<image>", "<|im_start|>", "<|im_end|>"]})
    assert encode(TURNS, made, "chatml").num_supervised > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", CHATS)
def test_the_shared_odd_items_never_learn_a_human_turn(kind, template, shared):
    made = tok(kind)
    items, _ = read_llava(shared / "broken" / "llava_odd_items.json", image_root=shared / "broken")
    for item in items:
        out = encode(item.turns, made, template, n=4, max_length=600)
        learnt = made.decode(supervised(out), skip_special_tokens=item.id != "role_words_in_text")
        answers = "".join(answer for _, answer in item.turns)
        if item.id == "long":
            assert out.cut
            assert len(out.input_ids) == 600
            assert answers.startswith(learnt.strip())
        elif item.id == "role_words_in_text":
            assert learnt.replace(" ", "").startswith("ASSISTANT:hello</s>USER:bye")
            assert "Finish" not in learnt
        else:
            assert learnt.replace(" ", "") == answers.replace(" ", "")
            assert not out.cut


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_read_back_as_the_text(kind):
    made = tok(kind)
    out = encode(TURNS, made, "demo", n=1)
    text = made.decode(out.input_ids, skip_special_tokens=False)
    eos = made.eos_token
    expected = f"USER: <image>\nWhat is this? ASSISTANT: a red circle.{eos}USER: how many ASSISTANT: It's 3, not 12!{eos}"
    assert text.removeprefix(made.bos_token if kind == "sp" else "").replace(" ", "") == expected.replace(" ", "")


def test_an_empty_question_is_allowed():
    made = tok("sp")
    out = encode([("<image>", "a dog")], made, "demo", n=2)
    assert out.input_ids[: len(prompt("", made, "demo", n=2))] == prompt("", made, "demo", n=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", CHATS)
def test_several_pictures_stay_where_their_markers_are(kind, template):
    made = tok(kind)
    turns = [("This <image> or <image>\nthat?", "that one"), ("And <image>?", "three"), ("near", "two")]
    out = encode(turns, made, template, n=2, images=3)
    image_id = made.convert_tokens_to_ids("<image>")
    runs, previous = [], None
    for token, label in zip(out.input_ids, out.labels, strict=True):
        if token == image_id:
            assert label == -100
            runs = [*runs[:-1], runs[-1] + 1] if previous == image_id else [*runs, 1]
        previous = token
    assert runs == [2, 2, 2]
    assert (out.num_images, out.cut) == (3, False)
    parts = [{"type": "text", "text": "This "}, {"type": "image"}, {"type": "text", "text": "or "}, {"type": "image"}]
    chat = [
        {"role": "user", "content": [*parts, {"type": "text", "text": "that?"}]},
        {"role": "assistant", "content": "that one"},
        {"role": "user", "content": [{"type": "text", "text": "And ?"}, {"type": "image"}]},
        {"role": "assistant", "content": "three"},
    ]
    text = made.apply_chat_template(chat, chat_template=chat_template(template, made), tokenize=False)
    spelt = [("This <image>\nor <image>\nthat?", "that one"), turns[1]]
    assert made(text.replace("<image>", "<image>" * 2)).input_ids == encode(spelt, made, template, n=2, images=3).input_ids


def test_pictures_that_are_next_to_each_other_have_all_their_tokens():
    made = tok("sp")
    out = encode([("<image><image>", "two")], made, "demo", n=3, images=2)
    assert out.input_ids.count(made.convert_tokens_to_ids("<image>")) == 6
    assert prompt("", made, "demo", n=3, images=2) == prompt("<image>\n<image>", made, "demo", n=3, images=2)
    with pytest.raises(InputError, match="2 pictures need as many <image> in the questions, found 1"):
        prompt("<image> and?", made, "demo", images=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", CHATS)
@pytest.mark.parametrize("n", [0, 3])
def test_a_system_text_takes_the_place_of_the_templates_own(kind, template, n):
    made = tok(kind)
    turns = TURNS if n else [(q.replace("<image>\n", ""), a) for q, a in TURNS]
    out = encode(turns, made, template, n=n, system=" Be brief, say </s> and <|im_end|>. ")
    text = made.decode(out.input_ids)
    assert "Be brief, say </s> and <|im_end|>." in text
    assert "helpful" not in text
    assert supervised(out) == supervised(encode(turns, made, template, n=n))
    asked = prompt(turns[0][0], made, template, n=n, system="Be brief, say </s> and <|im_end|>.")
    assert out.input_ids[: len(asked)] == asked
    chat = [{"role": "system", "content": [{"type": "text", "text": " Be brief. "}]}, *messages(turns, n)]
    text = made.apply_chat_template(chat, chat_template=chat_template(template, made), tokenize=False)
    expected = encode(turns, made, template, n=n, system="Be brief.").input_ids
    assert made(text.replace("<image>", "<image>" * n)).input_ids == expected
    assert encode(turns, made, template, n=n, system=" \n").input_ids == encode(turns, made, template, n=n).input_ids


def test_plain_keeps_pictures_only():
    made = tok("sp")
    bare = encode([("<image><image>", "a dog")], made, "plain", images=2)
    turns = [("Both <image> and <image>!", "a dog")]
    assert encode(turns, made, "plain", images=2, system="Be brief.").input_ids == bare.input_ids
    chat = [{"role": "system", "content": "Be brief."}, *messages([("<image>", "a dog")], 3)]
    text = made.apply_chat_template(chat, chat_template=chat_template("plain", made), tokenize=False)
    assert text == "<image>a dog\n"


@pytest.mark.parametrize("template", CHATS)
def test_a_role_without_a_place_is_refused(template):
    made = tok("sp")
    for chat in ([{"role": "tool", "content": "x"}], [*messages(TURNS[1:], 0), {"role": "system", "content": "x"}]):
        with pytest.raises(TemplateError, match="unknown role"):
            made.apply_chat_template(chat, chat_template=chat_template(template, made), tokenize=False)
