"""Small tokenizers and chat templates of the families in use, written for the tests."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

LINES = [
    "the assistant answers the user, and the user asks again: what is two and two?",
    "two and two is four. think first, then answer the question in a line.\n\n",
    "system user assistant model\nAnswer: 12\n\n\nquestion answer think Answer: 4\n",
    "a box holds red marbles and blue marbles; how many marbles does it hold?",
] * 4
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|fim_pad|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<s>",
    "</s>",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITHOUT_PROMPT = CHATML.split("{% if add")[0]
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
    "+ m.content | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
    "+ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# No generation prompt, and the system prompt moves to the last question.
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{{ '<s>' }}"
    "{% set last = rest | selectattr('role', 'equalto', 'user') | list | last %}"
    "{% for m in rest %}{% if m.role == 'user' %}{% if m == last and system is defined %}"
    "{{ '[INST] ' + system + '\n\n' + m.content + ' [/INST]' }}{% else %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m.content | trim + '</s>' }}{% endif %}{% endfor %}"
)
# Without a generation prompt an end of text follows the conversation.
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}"
    "{% endif %}"
)
# Thoughts of earlier turns are stripped; the last turn gets an empty block where it has none.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set answer = m.content.split('</think>')[-1].strip() %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip() "
    "if '</think>' in m.content else '' %}"
    "{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' + answer }}"
    "{% else %}{{ answer }}{% endif %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if no_thinking is defined %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
DROPS = (
    "{% for m in messages %}{% if m.role != 'assistant' %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
WITHOUT_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # "\n\n" is one token, as in the large vocabularies.
    trainer = BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def byte_level(
    template: str | None = CHATML, *, eos: str | None = "<|im_end|>", pad: str | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE as of GPT-2 and Qwen: decoding gives any text back."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(), eos_token=eos, pad_token=pad or eos
    )
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece(template: str | None = MISTRAL) -> PreTrainedTokenizerFast:
    """BPE with a space in front of words as of Llama 2: a prefix space, BOS in front, NFKC."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    # As Phi-3's: white space behind a header is the header's.
    headers = {"<|assistant|>", "<|user|>"}
    tokenizer.add_special_tokens([AddedToken(t, rstrip=t in headers) for t in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = template
    return fast


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: str) -> dict[str, str]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}
