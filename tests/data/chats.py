"""Chat templates of the shapes that language models come with, written from their documented formats, and tokenizers."""

from __future__ import annotations

from models.tiny import tokenizer
from transformers import AddedToken

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
    "{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
LLAMA3 = (
    "{{- bos_token }}\n"
    "{%- if not date_string is defined %}\n    {%- set date_string = strftime_now('%d %b %Y') %}\n{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n    {%- set system = messages[0]['content']|trim %}\n"
    "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system = '' %}\n{%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}\n{{- 'Today Date: ' + date_string + '\\n\\n' }}\n"
    "{{- system }}\n{{- '<|eot_id|>' }}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
)
# The version of 7B-Instruct-v0.2: no system role.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
QWEN25 = (
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
    "{%- else %}\n    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\n{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {%- if (message.role == 'user') or (message.role == 'system' and not loop.first) or (message.role == 'assistant') %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
# Thinking is written around the last answer only, found in the text, and left out of the prompt on demand.
QWEN3 = (
    "{%- if messages[0].role == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\n{%- endif %}\n"
    "{%- set ns = namespace(searching=true, last_query=messages|length - 1) %}\n"
    "{%- for message in messages[::-1] %}\n"
    "    {%- if ns.searching and message.role == 'user' and not message.content.startswith('<tool_response>') %}\n"
    "        {%- set ns.searching = false %}\n"
    "        {%- set ns.last_query = messages|length - 1 - loop.index0 %}\n    {%- endif %}\n{%- endfor %}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "    {%- elif message.role == 'assistant' %}\n"
    "        {%- set content = message.content %}\n        {%- set reasoning = '' %}\n"
    "        {%- if '</think>' in content %}\n"
    "            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}\n"
    "            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n        {%- endif %}\n"
    "        {%- if loop.index0 > ns.last_query %}\n"
    "            {{- '<|im_start|>assistant\\n<think>\\n'"
    " + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}\n"
    "        {%- else %}\n            {{- '<|im_start|>assistant\\n' + content }}\n        {%- endif %}\n"
    "        {{- '<|im_end|>\\n' }}\n    {%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n"
    "{%- endif %}"
)
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Its tokens swallow the white space that follows them.
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
# Zephyr and TinyLlama: no start token in the text, though the tokenizer adds one to other texts.
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
# Takes contents in parts only, as the text models of some families with pictures do.
PARTS = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Command R: a turn begins with two control tokens, right after the one that ended the last.
COMMAND = (
    "{{ bos_token }}{% for message in messages %}{% set name = {'user': '<|USER|>', 'system': '<|SYSTEM|>',"
    " 'assistant': '<|BOT|>'} %}"
    "{{ '<|START|>' + name[message['role']] + message['content'].strip() + '<|END|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START|><|BOT|>' }}{% endif %}"
)
# The mark of transformers for what an assistant says; it renders as nothing.
GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

COMMAND_TOKENS = ("<|START|>", "<|END|>", "<|USER|>", "<|SYSTEM|>", "<|BOT|>")
CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
PHI3_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
GEMMA_TOKENS = ("<start_of_turn>", "<end_of_turn>")
# name: template, its control tokens, ordinary added tokens, tokenizers that such models have, and what ends a turn
SHAPES = {
    "llama2": (LLAMA2, (), (), ("sp",), "</s>"),
    "llama3": (LLAMA3, LLAMA3_TOKENS, (), ("bpe",), "<|eot_id|>"),
    "mistral": (MISTRAL, (), (), ("sp",), "</s>"),
    "qwen2.5": (QWEN25, CHATML, ("<tool_call>",), ("bpe",), "<|im_end|>"),
    "qwen3": (QWEN3, CHATML, ("<think>", "</think>"), ("bpe",), "<|im_end|>"),
    "smollm": (SMOLLM, CHATML, (), ("bpe",), "<|im_end|>"),
    # Some fine-tuned models have added ChatML's tokens as ordinary ones.
    "hermes": (SMOLLM, (), CHATML, ("bpe", "sp"), "<|im_end|>"),
    "phi3": (PHI3, PHI3_TOKENS, (), ("sp",), "<|end|>"),
    "gemma": (GEMMA, GEMMA_TOKENS, (), ("sp", "bpe"), "<end_of_turn>"),
    "zephyr": (ZEPHYR, (), (), ("sp", "bpe"), None),
    "command": (COMMAND, COMMAND_TOKENS, (), ("bpe", "sp"), "<|END|>"),
    "generation": (GENERATION, CHATML, (), ("bpe",), "<|im_end|>"),
    "parts": (PARTS, CHATML, (), ("sp", "bpe"), "<|im_end|>"),
}
CASES = [(shape, kind) for shape, (*_, kinds, _) in SHAPES.items() for kind in kinds]


def chat_tokenizer(shape, kind, *, image=True):
    """A tokenizer with the template and the tokens of a family."""
    template, special, ordinary, _, _ = SHAPES[shape]
    made = tokenizer(kind, image=image)
    rstrip = shape == "phi3"
    tokens = [AddedToken(t, special=True, normalized=False, rstrip=rstrip) for t in special]
    kept = list(made.extra_special_tokens or [])
    # As in Llama 3's file: special without being named as anything.
    made.add_tokens(tokens, special_tokens=True)
    made.add_tokens([AddedToken(t, special=False, normalized=False) for t in ordinary])
    assert list(made.extra_special_tokens or []) == kept
    made.chat_template = template
    return made
