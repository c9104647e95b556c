"""Batches made up for tests: `make_batch` is a factory fixture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import pytest
import torch

from data.schema import N_FEATURES, Batch

if TYPE_CHECKING:
    from collections.abc import Sequence


class MakeBatch(Protocol):
    def __call__(
        self,
        rows: int = 4,
        steps: int = 6,
        image_size: int = 32,
        classes: int = 3,
        *,
        present_cxr: Sequence[bool] | None = None,
        present_ehr: Sequence[bool] | None = None,
        lengths: Sequence[int] | None = None,
        seed: int = 0,
    ) -> Batch: ...


def batch(
    rows: int = 4,
    steps: int = 6,
    image_size: int = 32,
    classes: int = 3,
    *,
    present_cxr: Sequence[bool] | None = None,
    present_ehr: Sequence[bool] | None = None,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
) -> Batch:
    """Random rows; by default every second one has an image, all have a series.

    A row with a series has a note too, of one to five words, and every third row an abnormal lab
    result. A row with a series but the second has some of five lab items.
    """
    rng = torch.Generator().manual_seed(seed)
    cxr = torch.tensor(list(present_cxr or [row % 2 == 0 for row in range(rows)]))
    ehr = torch.tensor(list(present_ehr or [True] * rows))
    assert len(cxr) == len(ehr) == rows
    if lengths is None:
        drawn = torch.randint(1, steps + 1, (rows,), generator=rng)
        drawn[0] = steps
    else:
        drawn = torch.tensor(list(lengths))
    drawn = torch.where(ehr, drawn, 1)
    series = torch.randn(rows, steps, N_FEATURES, generator=rng)
    valid = (torch.arange(steps) < drawn[:, None]) & ehr[:, None]
    images = torch.randn(rows, 3, image_size, image_size, generator=rng)
    radiology = torch.randint(0, 2, (rows, 14), generator=rng).float()
    index = cxr.nonzero().squeeze(1)
    words = ["fever", "chest pain", "no cough", "dyspnea", "edema"]
    noted = ehr.nonzero().squeeze(1)
    notes = [" ".join(words[: 1 + (seed + row) % 5]) + f" {row}" for row in noted.tolist()]
    has_labs = ehr & (torch.arange(rows) != 1)
    labs = torch.rand(rows, 5, generator=rng)
    observed = (torch.rand(rows, 5, generator=rng) < 0.7) & has_labs[:, None]
    observed[:, 0] = has_labs
    sodium = "These are abnormal results recorded: ITEMID Sodium: 128 mEq/L;"
    return Batch(
        ehr=series * valid[:, :, None],
        lengths=drawn,
        cxr=images[index],
        cxr_index=index,
        present={"ehr": ehr, "cxr": cxr, "notes": ehr, "labs": has_labs},
        targets=torch.randint(0, 2, (rows, classes), generator=rng).float(),
        cxr_targets=radiology[index],
        rows=np.arange(rows),
        notes=tuple(notes),
        notes_index=noted,
        lab_texts=tuple(sodium if ehr[row] and row % 3 == 0 else "" for row in range(rows)),
        labs=labs * observed,
        labs_observed=observed,
        draws=np.random.default_rng(seed).integers(2**63, size=rows, dtype=np.uint64),
    )


@pytest.fixture
def make_batch() -> MakeBatch:
    return batch


CORPUS = (
    "Chief Complaint: chest pain, no fever",
    "History of Present Illness: dyspnea on exertion and edema",
    "Past Medical History: renal failure, atrial fibrillation",
    "These are abnormal results recorded: ITEMID Sodium: 128 mEq/L; ITEMID Urea: 40 mg/dL;",
)


def _byte_tokenizer():
    """Byte-level pairs as Llama-3's: BOS before a text, an end-of-text token, no padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


def _word_tokenizer():
    """Words as BERT's, with its five special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": word for name, word in names.items()}
    )


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    # Large enough that attention, and not the embedding alone, moves the outputs.
    "initializer_range": 0.3,
}


def _save_base(folder, family, *, seed=0, **sizes):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForPreTraining
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = _word_tokenizer() if family == "bert" else _byte_tokenizer()
    kind = AutoModelForPreTraining if family == "bert" else AutoModelForCausalLM
    rope = {} if family == "bert" else {"num_key_value_heads": 2, "bos_token_id": 0}
    config = AutoConfig.for_model(
        family,
        **{**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 256, **rope, **sizes},
    )
    torch.manual_seed(seed)
    kind.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_base(tmp_path_factory):
    """`make_base(family, **sizes)`: the folder of a tiny llama, mistral or bert with its head."""

    def make(family, **sizes):
        return _save_base(tmp_path_factory.mktemp(family), family, **sizes)

    return make


@pytest.fixture(scope="session")
def bases(make_base):
    """Folders of one model a family."""
    # Mistral looks back 16 tokens: less than a text.
    return {
        "llama": make_base("llama"),
        "mistral": make_base("mistral", sliding_window=16),
        "bert": make_base("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    }
