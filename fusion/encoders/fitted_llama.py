"""A small Llama without weights, with a tokenizer fitted on texts: for benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.files import atomic_path

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

LENGTH = 512


def write_llama(
    folder: Path, texts: Iterable[str], *, vocabulary: int, width: int, layers: int, heads: int
) -> None:
    """Write the folder of a backbone for `random_weights: true`, if it is not there.

    Args:
        folder: For `model.backbone`.
        texts: The tokenizer, byte-level pairs, is fitted on them.
        vocabulary: Most tokens, 258 at least.
        width: Of the hidden states; the networks are twice as wide.
        layers: How many.
        heads: They divide `width`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    if folder.is_dir():
        return
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.1,
        architectures=["LlamaModel"],
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    with atomic_path(folder) as unfinished:
        config.save_pretrained(unfinished)
        fast.save_pretrained(unfinished)
