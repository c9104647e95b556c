"""Adapters and heads as peft keeps them: a folder that transformers and peft open by themselves.

adapter_model.safetensors, adapter_config.json, the tokenizer, README.md (the model card) and
rayfuse.json, which names labels, base and hashes. The base is referred to, never copied.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from data.errors import InputError
from data.files import sha256_file, write_json, write_text
from fusion.encoders.text_adapters import NAME, adapted_modules, is_adapter
from fusion.encoders.text_base import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from fusion.encoders.text import TextEncoder

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
DETAILS: Final = "rayfuse.json"
FORMAT: Final = 1
_BACKBONE: Final = "text.model."
_HEAD: Final = "head."
_PEFT: Final = "base_model.model."
_FORM: Final = {
    "r": "model.rank",
    "lora_alpha": "model.alpha",
    "use_rslora": "model.adapter",
    "use_dora": "model.adapter",
}
"""What decides an adapter's shapes and scale, as peft names it and as a run does."""


def write_adapter(
    folder: Path, state: Mapping[str, Tensor], text: TextEncoder, labels: Sequence[str]
) -> None:
    """Write the adapters and the head of a trained note model.

    Args:
        folder: New or empty.
        state: The trained weights by the model's names, as best/ holds them; no frozen base.
        text: The model's text encoder: its base, its options, its tokenizer.
        labels: In the order of the logits.

    Raises:
        InputError: The model has no adapters, or `state` lacks some of them.
    """
    from safetensors.torch import save_file

    kept = {
        peft_name(name, text): value.detach().cpu().contiguous().clone()
        for name, value in state.items()
        if is_adapter(name) or name.startswith(_HEAD)
    }
    expected = {
        peft_name(_BACKBONE + name, text)
        for name in dict(text.model.named_parameters())
        if is_adapter(name)
    }
    if not expected:
        raise InputError(
            f"model.adapter={text.options.adapter}: there are no adapters to write; export the run"
        )
    if missing := expected - kept.keys():
        raise InputError(
            f"{len(missing)} of {len(expected)} tensors of adapters are missing, first "
            f"{min(missing)}; give the weights of a run of this config"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    _save_config(folder, text)
    text.tokenizer.save(str(folder))
    details = {
        "format": FORMAT,
        "labels": list(labels),
        "base": text.base.title,
        "revision": text.base.revision,
        "base_sha256": text.base.sha256(),
        "sha256": sha256_file(folder / WEIGHTS),
        "max_length": text.options.max_length,
    }
    write_json(folder / DETAILS, details)
    write_text(folder / "README.md", _card(details, text))


def read_adapter(folder: Path, text: TextEncoder, labels: Sequence[str]) -> dict[str, Tensor]:
    """The adapters and the head of `write_adapter`, by the model's names.

    Args:
        folder: As written.
        text: The text encoder they are for.
        labels: Those of the task, in the order of the logits.

    Raises:
        InputError: The folder is not whole, or of another base, other labels or other adapters.
    """
    return fitting_weights(folder, text, labels, text.base.sha256())


def is_written(folder: Path) -> bool:
    """Whether a folder is one that `write_adapter` wrote."""
    return (folder / DETAILS).is_file() and (folder / CONFIG).is_file()


def stored_weights(folder: Path) -> dict[str, Tensor]:
    """What a folder holds, by the model's names.

    Raises:
        InputError: It is not whole.
    """
    _details(folder)
    return _loaded(folder)


def fitting_weights(
    folder: Path, text: TextEncoder, labels: Sequence[str] | None, base_sha256: str | None
) -> dict[str, Tensor]:
    """What a folder holds, if it is for this base, these labels and this form of adapters.

    Args:
        folder: As written.
        text: The text encoder it is for.
        labels: Those of the task, in the order of the logits; None where no head is wanted.
        base_sha256: Of the base that is there; None where its weights are drawn.

    Raises:
        InputError: It does not fit, or the folder is not whole.
    """
    details = _details(folder)
    if details["base_sha256"] != base_sha256:
        revision = f" at revision {details['revision']}" if details["revision"] else ""
        now = f"is {text.base.name} (sha256 {base_sha256})" if base_sha256 else "has random weights"
        raise InputError(
            f"{folder}: an adapter for {details['base']}{revision} (sha256 "
            f"{details['base_sha256']}), but model.backbone {now}; set model.backbone to that base"
        )
    if labels is not None and details["labels"] != list(labels):
        raise InputError(
            f"{folder}: an adapter for the labels {', '.join(details['labels'])}, but the task has "
            f"{', '.join(labels)}; choose the task that it was trained for"
        )
    form = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    refuse_other_form(folder, form, text)
    wanted = {_BACKBONE + name for name in dict(text.model.named_parameters()) if is_adapter(name)}
    stored = _loaded(folder)
    found = {name for name in stored if not name.startswith(_HEAD)}
    if wanted != found:
        raise InputError(
            f"{folder}: other adapters than model.adapter and model.target_modules ask for: "
            f"{min(wanted ^ found)} is on one side only; use the config that it was trained with"
        )
    return stored


def refuse_other_form(source: Path, form: Mapping[str, Any], text: TextEncoder) -> None:
    """Refuse adapters of another rank, scale or kind than those of a model.

    Args:
        source: Where they lie.
        form: Their configuration, as peft names it.
        text: The text encoder they are for.

    Raises:
        InputError: They differ.
    """
    here = text.adapter_config()
    for field, setting in _FORM.items():
        if form.get(field) != getattr(here, field):
            raise InputError(
                f"{source}: an adapter with {field}={form.get(field)}, but {setting} makes it "
                f"{getattr(here, field)}; set {setting} to that of the adapter"
            )


def _loaded(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {_model_name(key): value for key, value in load_file(folder / WEIGHTS).items()}


def _model_name(key: str) -> str:
    """The inverse of `peft_name`, whatever the architecture."""
    top, _, inner = key.removeprefix(_PEFT).partition(".")
    if top in {family.head for family in FAMILIES.values()}:
        return _HEAD + inner
    parts = inner.split(".")
    if is_adapter(inner):
        parts.insert(-1, NAME)
    return _BACKBONE + ".".join(parts)


def peft_name(name: str, text: TextEncoder) -> str:
    """The name that a trained tensor has in peft's files, on transformers' sequence classifier."""
    family = text.base.family
    if name.startswith(_HEAD):
        return f"{_PEFT}{family.head}.{name.removeprefix(_HEAD)}"
    inner = name.removeprefix(_BACKBONE).replace(f".{NAME}.weight", ".weight")
    return f"{_PEFT}{family.prefix}.{inner}"


def _save_config(folder: Path, text: TextEncoder) -> None:
    family = text.base.family
    modules = adapted_modules(list(dict(text.model.named_parameters())))
    config = text.adapter_config(
        target_modules=sorted(f"{family.prefix}.{module}" for module in modules),
        task_type="SEQ_CLS",
        base_model_name_or_path=text.base.title,
        revision=text.base.revision,
        modules_to_save=[family.head],
        inference_mode=True,
    )
    config.save_pretrained(str(folder))


def _details(folder: Path) -> dict[str, Any]:
    path = folder / DETAILS
    try:
        details: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}); give a folder that holds an adapter"
        ) from None
    if details.get("format") != FORMAT:
        raise InputError(
            f"{path}: format {details.get('format')!r}, but this version reads {FORMAT}; use the "
            "version that wrote it"
        )
    weights = folder / WEIGHTS
    if not weights.is_file() or sha256_file(weights) != details["sha256"]:
        raise InputError(f"{weights}: missing or altered; write the adapter again")
    return details


def _card(details: Mapping[str, Any], text: TextEncoder) -> str:
    options, revision = text.options, details["revision"] or "none: a folder"
    shown = details["base"] if details["revision"] else f"<folder of {details['base']}>"
    labels = "\n".join(f"{place}. {label}" for place, label in enumerate(details["labels"]))
    count = len(details["labels"])
    trained = sum(p.numel() for n, p in text.model.named_parameters() if is_adapter(n))
    return f"""---
base_model: {json.dumps(details["base"])}
library_name: peft
pipeline_tag: text-classification
---
# {options.adapter} adapter and head for {count} labels

Base: `{details["base"]}`, revision {revision}, sha256 `{details["base_sha256"]}`. The base is not
in this folder.

| | |
|---|---|
| adapter | {options.adapter}, rank {options.rank}, alpha {options.alpha:g} |
| trained parameters of the adapter | {trained:,} |
| longest text | {options.max_length} tokens; the note is cut before the abnormal results |
| padding token | `{text.tokenizer.pad_token}` |

Each label is a Bernoulli of its own: the sigmoid of its logit. A text is
a note, a line break, and a sentence of abnormal results.

{labels}

    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = AutoModelForSequenceClassification.from_pretrained(
        {shown!r}, num_labels={count}
    )
    model = PeftModel.from_pretrained(base, "<this folder>")
    tokenizer = AutoTokenizer.from_pretrained("<this folder>")
    model.config.pad_token_id = tokenizer.pad_token_id

Trained on patients' notes: not for use in care without an evaluation of its own.
"""
