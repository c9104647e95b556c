"""The text encoder against transformers' own models, its layouts against one text at a time."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertModel

from data.errors import InputError
from fusion.encoders.text import TextEncoder, TextOptions
from fusion.encoders.text_layout import group_packed, group_padded

FAMILIES = ("llama", "mistral", "bert")
NOTES = (
    "Chief Complaint: chest pain",
    "History of Present Illness: dyspnea on exertion, edema, no fever, renal failure",
    "x",
    "Past Medical History: atrial fibrillation and renal failure since many years, no edema",
)
LABS = ("ITEMID Sodium: 128 mEq/L;", "", "ITEMID Urea: 40 mg/dL;", "")


def encoder(folder, **options):
    defaults = {"adapter": "none", "base_precision": "fp32", "max_length": 128}
    torch.manual_seed(0)
    return TextEncoder(TextOptions(backbone=str(folder), **{**defaults, **options})).eval()


def texts(made, notes=NOTES, labs=LABS):
    return [made.tokens(*pair) for pair in zip(notes, labs, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_pools_what_transformers_classifies(bases, family):
    """With the head of transformers' model for sequences, its logits."""
    made = encoder(bases[family])
    model = AutoModelForSequenceClassification.from_pretrained(bases[family], num_labels=3).eval()
    model.config.pad_token_id = made.tokenizer.pad_id
    head = getattr(model, made.base.family.head)
    assert (head.bias is not None) == made.base.family.head_bias
    with torch.no_grad():
        logits = head(made(texts(made)))
        for text, row in zip(texts(made), logits, strict=True):
            theirs = model(input_ids=torch.tensor([text.ids])).logits[0]
            torch.testing.assert_close(row, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_several_texts_are_as_each_alone(bases, family, layout):
    made = encoder(bases[family], layout=layout)
    alone = encoder(bases[family])
    read = texts(made)
    assert len({len(text.ids) for text in read}) == len(read)
    assert family != "mistral" or max(len(text.ids) for text in read) > 32
    together = made(read)
    single = torch.cat([alone([text]) for text in read])
    assert (single[0] - single[1]).abs().max() > 0.05, "texts do not differ"
    torch.testing.assert_close(together, single, atol=1e-5, rtol=0)
    shuffled = made([read[place] for place in (2, 0, 3, 1)])
    torch.testing.assert_close(shuffled, single[[2, 0, 3, 1]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_reads_no_neighbour_and_no_padding(bases, family):
    """Gradients of a text's vector reach its own tokens only; a pass has no others than real."""
    made = encoder(bases[family], layout="packed", adapter="full")
    seen = []
    embedding = made.model.get_input_embeddings()

    def keep(module, inputs, output):
        output.retain_grad()
        seen.append(output)

    embedding.register_forward_hook(keep)
    read = texts(made)
    made(read)[1].sum().backward()
    assert seen[0].shape[:2] == (1, sum(len(text.ids) for text in read))
    touched = seen[0].grad.abs().sum(2)[0] > 0
    first = len(read[0].ids)
    inside = torch.zeros_like(touched)
    inside[first : first + len(read[1].ids)] = True
    assert not touched[~inside].any()
    assert touched[inside].any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_adapters_begin_as_nothing_and_alone_are_trained(bases, family, kind):
    plain, adapted = encoder(bases[family]), encoder(bases[family], adapter=kind, rank=4)
    torch.testing.assert_close(adapted(texts(plain)), plain(texts(plain)), atol=1e-5, rtol=0)
    trained = {name for name, value in adapted.named_parameters() if value.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert adapted.frozen_names() == adapted.state_dict().keys() - trained
    linear = [n for n, m in plain.model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert len([name for name in trained if "lora_A" in name]) == len(linear)


def test_kinds_of_adapters_scale_as_they_should(bases):
    def scaling(kind):
        made = encoder(bases["llama"], adapter=kind, rank=4, alpha=8)
        return made.model.layers[0].self_attn.q_proj.scaling["default"]

    assert scaling("lora") == 2.0
    assert scaling("rslora") == 4.0


def test_a_bfloat16_base_has_float32_adapters_and_the_same_meaning(bases):
    low = encoder(bases["llama"], adapter="lora", base_precision="bf16")
    kinds = {("lora_" in name, value.dtype) for name, value in low.named_parameters()}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}
    full = encoder(bases["llama"])
    ours, theirs = low(texts(low)), full(texts(full))
    assert ours.dtype == torch.float32
    assert torch.cosine_similarity(ours, theirs).min() > 0.99


@pytest.mark.parametrize("length", [64, 256])
def test_padding_to_any_length_is_the_same(bases, length):
    """Sanity check 34, in bf16: the same text beside a longer one."""
    made = encoder(bases["llama"], adapter="lora", base_precision="bf16", max_length=length)
    short = made.tokens("chest pain", "")
    long = made.tokens("edema " * 300, "")
    assert len(long.ids) == length
    alone, beside = made([short])[0], made([short, long])[0]
    assert torch.cosine_similarity(alone, beside, dim=0) > 0.999


def test_groups_hold_every_text_once_within_the_budget():
    lengths = [5, 90, 31, 7, 7, 100, 30, 2, 140]
    padded, packed = group_padded(lengths, 100), group_packed(lengths, 100)
    for groups in (padded, packed):
        assert sorted(place for group in groups for place in group) == list(range(9))
        assert all(group == sorted(group) for group in groups)
        assert [8] in groups, "one longer than the budget is alone"
    rows = [[lengths[place] for place in group] for group in padded]
    assert all(len(group) * max(group) <= 100 for group in rows if 140 not in group)
    sums = [sum(lengths[place] for place in group) for group in packed]
    assert all(total <= 100 for total in sums if total != 140)
    assert len(packed) <= len(padded)


def test_names_of_old_files_of_bert_are_understood(bases, tmp_path):
    folder = shutil.copytree(bases["bert"], tmp_path / "old")
    state = load_file(folder / "model.safetensors")
    assert any(name.startswith("bert.") for name in state)
    assert any(name.startswith("cls.") for name in state)
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in state.items()
    }
    save_file(renamed, folder / "model.safetensors")
    made, old = encoder(bases["bert"]), encoder(folder)
    assert torch.equal(made(texts(made)), old(texts(old)))


def test_a_backbone_in_several_files_without_a_head(bases, tmp_path):
    folder = tmp_path / "parts"
    model = BertModel.from_pretrained(bases["bert"])
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bases["bert"] / name, folder)
    made, parts = encoder(bases["bert"]), encoder(folder)
    assert torch.equal(made(texts(made)), parts(texts(parts)))
    assert made.base.sha256() != parts.base.sha256()
    torn, *_, lost = sorted(folder.glob("*.safetensors"))
    content = torn.read_bytes()
    for spoiled in (content[:100], content[:-1], b""):
        torn.write_bytes(spoiled)
        with pytest.raises(InputError, match=rf"{torn.name}: no safetensors file.*download it"):
            encoder(folder)
    torn.write_bytes(content)
    lost.unlink()
    with pytest.raises(InputError, match=r"model-0000\d.*missing, but"):
        encoder(folder)


def spoiled(bases, folder, name, change):
    copy = shutil.copytree(bases["llama"], folder)
    change(copy / name)
    return copy


def edit_config(**values):
    def change(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


BAD = {
    "config.json": [
        (lambda path: path.unlink(), "holds no config.json"),
        (lambda path: path.write_text("{"), "is no configuration"),
        (edit_config(model_type="gpt2"), "'gpt2' is not known"),
        (edit_config(hidden_size=64), "has in another shape embed_tokens"),
        (edit_config(num_hidden_layers=3), "lacks layers.2"),
        (edit_config(num_hidden_layers=1), "has no place for layers.1"),
        (edit_config(vocab_size=100), "has token 3"),
    ],
    "tokenizer.json": [(lambda path: path.unlink(), "its tokenizer cannot be read")],
    "model.safetensors": [
        (lambda path: path.rename(path.with_name("pytorch_model.bin")), "bin is not read, convert"),
        (lambda path: path.write_bytes(b"version https://git-lfs"), "no safetensors file"),
    ],
}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [(name, *case) for name, cases in BAD.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_folder_is_refused_by_name(bases, tmp_path, name, change, message):
    folder = spoiled(bases, tmp_path / "base", name, change)
    with pytest.raises(InputError, match=message) as caught:
        encoder(folder)
    assert str(folder) in str(caught.value)


def test_an_absent_model_says_where_it_was_looked_for(tmp_path, monkeypatch):
    from huggingface_hub import constants

    with pytest.raises(InputError, match=f"no folder {tmp_path / 'none'}"):
        encoder(tmp_path / "none")
    with pytest.raises(InputError, match=r"model\.offline is true") as caught:
        encoder("nobody/no-such-model", revision="abc")
    assert str(constants.HF_HUB_CACHE) in str(caught.value)
    assert "at revision abc" in str(caught.value)


def test_a_model_of_the_hub_comes_from_its_cache(bases, tmp_path, monkeypatch):
    """Laid out as a download leaves it; the revision is the commit."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "a" * 40
    home = tmp_path / "models--some--llama"
    shutil.copytree(bases["llama"], home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    made = encoder("some/llama")
    assert made.base.revision == commit
    assert torch.equal(made(texts(made)), encoder(bases["llama"])(texts(made)))


def test_a_folder_is_named_from_the_root(bases, monkeypatch):
    """Workers run in folders of their own; what is no folder is a name of the hub."""
    monkeypatch.chdir(bases["llama"].parent)
    name = bases["llama"].name
    assert TextOptions(backbone=name).backbone == str(bases["llama"])
    assert TextOptions(backbone="some/llama").backbone == "some/llama"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 257}, "257 tokens.*has 256 positions"),
        ({"adapter": "lora", "target_modules": ("query",)}, "no modules named.*down_proj"),
        ({"pad_token": "[nowhere]"}, r"'\[nowhere\]' is not in the vocabulary"),
        ({"adapter": "qlora"}, "needs the package bitsandbytes|needs a CUDA device"),
    ],
)
def test_bad_options_are_refused(bases, options, message):
    with pytest.raises(InputError, match=message):
        encoder(bases["llama"], **options)
