"""A tokenizer of 35 tokens, built in code: digits, signed digits, and the strategies' words."""

from __future__ import annotations

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from benchmarks.llm.recipes.arithmetic.strategies import ANSWER, STRATEGIES

# Tokens of prompt and completion at most; the longest have 33.
CONTEXT = 64
PAD, EOS = "<pad>", "<eos>"
_WORDS = (*(strategy.marker for strategy in STRATEGIES.values()), ANSWER)
_TERMS = tuple(f"{sign}{digit}" for sign in "+-" for digit in range(1, 10))
_BASE = (PAD, EOS, *"0123456789=")
VOCABULARY = (*_BASE, *_WORDS, *_TERMS)
# Prompt and completion stand back to back; only the completion is trained on.
_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the arithmetic recipe, with pad, eos and a chat template; no bos.

    Nothing merges across a boundary: the tokens of prompt + completion are those of the prompt and
    then those of the completion. It is for texts of this task; other characters have no token and
    are dropped.
    """
    # The class that AutoTokenizer takes beside a Qwen2 config, whatever tokenizer was saved there.
    tokens = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(_BASE)},
        merges=[],
        # The default would be a token more.
        unk_token=None,  # type: ignore[arg-type]
        eos_token=EOS,
        pad_token=PAD,
        chat_template=_CHAT_TEMPLATE,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    tokens.add_tokens([AddedToken(token, normalized=False) for token in (*_WORDS, *_TERMS)])
    return tokens
