"""The whole method for language models in one file: iw-SFT on a model's own right answers.

A small decoder learns sums from rows of which four in ten are wrong. It then answers each sum many
times, a checker judges the answers, and iw-SFT trains on the right ones. Run it with
``python examples/language.py``. It takes about 15 seconds on one core.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from tensordict import TensorDictBase
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from iwsft import CausalLMPolicy, ImportanceWeightedMLE, ImportanceWeights, annotate_reference
from iwsft.language import EpochSampler, Row, correct_only, tokenize
from iwsft.objective import Proposal
from iwsft.trajectory import ASSISTANT_MASK, TOKENS

SUMS = [(a, b) for a in range(10) for b in range(10)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each character. A real one comes from ``AutoTokenizer``."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *"0123456789+="])}
    tokenizer = Tokenizer(WordLevel(vocabulary, "<pad>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_model() -> Qwen2ForCausalLM:
    """A small decoder. A real one comes from ``AutoModelForCausalLM.from_pretrained``."""
    config = Qwen2Config(
        vocab_size=14, hidden_size=64, intermediate_size=256, num_hidden_layers=2, pad_token_id=0
    )
    config.num_attention_heads = config.num_key_value_heads = 4
    config.eos_token_id = 1
    return Qwen2ForCausalLM(config)


def train(policy: CausalLMPolicy, data: TensorDictBase, proposal: Proposal, updates: int) -> None:
    """Maximise the weighted log-likelihood of the answers in ``data``."""
    # The weight of an answer is q / pi_ref of all its tokens.
    chain = ImportanceWeights(reduce="sum")
    loss = ImportanceWeightedMLE(
        policy, importance_weights=chain, proposal=proposal, functional=False
    )
    # The actions are tokens, and only those of the answers count.
    loss.set_keys(action=TOKENS)
    loss.loss_mask_key = ASSISTANT_MASK
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    batches = EpochSampler(data, batch_size=64, pad_token_id=0)
    for update in range(updates):
        out = loss(next(batches))
        optimizer.zero_grad()
        out["loss_iw_mle"].backward()
        optimizer.step()
        if update % 50 == 0:
            print(f"  loss {out['loss_iw_mle'].item():.3f}, ESS {out['ESS'].item():.2f}")


@torch.no_grad()
def sample(model: Any, tokenizer: PreTrainedTokenizerFast, each: int) -> list[Row]:
    """Sample answers to every sum; a row says whether its answer is correct."""
    sums = [pair for pair in SUMS for _ in range(each)]
    prompts = [f"{a}+{b}=" for a, b in sums]
    inputs = tokenizer(prompts, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=True)
    # Each prompt is four tokens long.
    answers = tokenizer.batch_decode(tokens[:, 4:], skip_special_tokens=True)
    rows = []
    for (a, b), prompt, text in zip(sums, prompts, answers, strict=True):
        answer = text.replace(" ", "")
        # A row without an answer has no action to learn from.
        if answer:
            rows.append(Row(prompt, prompt=prompt, completion=answer, correct=answer == str(a + b)))
    return rows


def main(base_updates: int = 250, updates: int = 101, each: int = 20) -> dict[str, float]:
    """Train the base model and fine-tune it; the share of correct answers before and after."""
    torch.manual_seed(0)
    generator = random.Random(0)
    tokenizer = make_tokenizer()
    policy = CausalLMPolicy(make_model())

    # 1. The base model is pi_ref: SFT on all rows. With q = pi_ref every weight is 1.
    texts = [
        (f"{a}+{b}=", str(a + b + (generator.random() < 0.4)))
        for a, b in generator.choices(SUMS, k=4000)
    ]
    rows = [Row(prompt, prompt=prompt, completion=text) for prompt, text in texts]
    train(policy, tokenize(rows, tokenizer).trajectories, "reference", base_updates)

    # 2. The trajectories are answers of the model. Curation keeps the correct ones, D+.
    samples = sample(policy.model, tokenizer, each)
    curated = correct_only(tokenize(samples, tokenizer).trajectories)

    # 3. log pi_ref of every token is computed once.
    annotate_reference(policy, curated)

    # 4. iw-SFT, with the policy itself as q.
    train(policy, curated, "current", updates)

    tests = {"base": samples, "iw-sft": sample(policy.model, tokenizer, each)}
    shares = {name: sum(row.correct is True for row in t) / len(t) for name, t in tests.items()}
    print(f"correct answers: base {shares['base']:.0%}, iw-SFT {shares['iw-sft']:.0%}")
    return shares


if __name__ == "__main__":
    main()
