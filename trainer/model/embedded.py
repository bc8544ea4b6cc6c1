"""The embedded policy: a small model of the Qwen2 architecture and its tokenizer, made without any download.

The tokenizer is byte-level BPE, so it can encode any text. It is trained on the given puzzles, so that a gene symbol
with its comma (" CD3D,") is one token, both in the prompt and where a trace cites the gene. Labels and the fixed
sentences of the prompt are one token each too: a two-core machine should spend its time on cells and not on the system
message.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from data.errors import disk_errors
from data.files import replacing_folder
from trainer.model.loading import seeded

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# split at: a tag | a bar | a word with the space before it and the comma after it | a lone comma | white space
WORDS = r" ?</?(?:think|answer)>| ?\|| ?[^\s<>|,]+,?| ?[<>,]|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size of the embedded model; about a million parameters with the demo's vocabulary."""

    hidden: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 4
    """Fewer than heads: grouped-query attention (arXiv:2305.13245)."""
    intermediate: int = 384
    """Width of the MLP."""
    context: int = 4096
    """Longest prompt + response in tokens."""


def make_tokenizer(
    texts: Iterable[str], words: Iterable[str] = (), phrases: Iterable[str] = (), vocab_size: int = 8192
) -> PreTrainedTokenizerFast:
    """A tokenizer trained on `texts`.

    words: gene symbols; each becomes a token, with and without a comma after it. phrases: each becomes one token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, TURN_START, TURN_END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    # each word twice, so that it reaches min_frequency even if no text has it; sorted, so that the result is the same
    listed = [f" {word}, {word}" for word in sorted(set(words)) for _ in range(2)]
    tokenizer.train_from_iterator([*texts, *listed], trainer)
    tokenizer.add_tokens([AddedToken(phrase, single_word=True, normalized=False) for phrase in sorted(set(phrases))])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=PAD)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def create_policy(
    out: str | Path,
    texts: Iterable[str],
    words: Iterable[str] = (),
    phrases: Iterable[str] = (),
    *,
    shape: Shape = Shape(),
    seed: int = 0,
) -> int:
    """Write a randomly initialised checkpoint (model and tokenizer) to folder `out`. Returns its number of parameters.

    The weights are a function of shape, vocabulary size and seed.
    """
    tokenizer = make_tokenizer(texts, words, phrases)
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,  # rounded up: matrix products are faster
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        # with the usual 0.02 a narrow model spends its first hundred steps on a plateau (LOG.md, 2026-11-20)
        initializer_range=shape.hidden**-0.5,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    transformers_logging.disable_progress_bar()
    with seeded(seed):
        model = Qwen2ForCausalLM(config).to(torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with replacing_folder(out) as partial, disk_errors(out):  # whole, or not at all
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return sum(p.numel() for p in model.parameters())
