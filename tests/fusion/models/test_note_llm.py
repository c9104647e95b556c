"""The note model: which rows have a text, what is minimised, what checkpoints leave to the base."""

from __future__ import annotations

import traceback
from dataclasses import replace

import pytest
import torch

from data.errors import InputError
from data.tasks import TaskSpec
from fusion import registry
from fusion.losses.rows import bce_by_class

CANARY = "zqxcanary"


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_row_reads_its_own_note_and_its_own_results(build, make_batch, layout):
    model = build("note_llm", layout=layout).eval()
    batch = make_batch(rows=6, present_ehr=[True, True, False, True, True, True])
    logits = model(batch).logits
    assert not logits[2].any(), "no text"
    other = replace(batch, notes=(*batch.notes[:2], "edema", *batch.notes[3:]))
    changed = (model(other).logits - logits).abs().amax(1) > 1e-6
    assert changed.tolist() == [False, False, False, True, False, False]
    labs = (*batch.lab_texts[:1], "ITEMID Urea: 40 mg/dL;", *batch.lab_texts[2:])
    changed = (model(replace(batch, lab_texts=labs)).logits - logits).abs().amax(1) > 1e-6
    assert changed.tolist() == [False, True, False, False, False, False]


def test_results_alone_are_a_text_and_an_empty_note_is_none(build, make_batch):
    model = build("note_llm").eval()
    batch = make_batch(rows=3)
    alone = replace(batch, notes=(" ", "\0", batch.notes[2]))
    logits = model(alone).logits
    assert logits[0].any(), "row 0 has results"
    assert not logits[1].any()
    only_labs = build("note_llm", text="labs").eval()(batch).logits
    torch.testing.assert_close(only_labs[0], logits[0])
    assert not only_labs[1:].any()
    only_notes = build("note_llm", text="notes").eval()(batch).logits
    torch.testing.assert_close(only_notes[2], logits[2])


def test_the_focal_term_alone_is_minimised(build, make_batch):
    batch = make_batch()
    focal, entropy = build("note_llm"), build("note_llm", loss="bce")
    assert [phase.terms for phase in focal.phases] == [("focal",)]
    assert [phase.terms for phase in entropy.phases] == [("task",)]
    assert not entropy(batch).terms
    plain = build("note_llm", focal_gamma=0.0)
    output = plain(batch)
    expected = bce_by_class(output.logits, batch.targets).mean(1).sum()
    torch.testing.assert_close(output.terms["focal"].sum, expected)
    assert focal(batch).terms["focal"].sum < expected


def test_rows_are_grouped_by_their_tokens(build, make_batch):
    model = build("note_llm")
    batch = make_batch(rows=9, present_ehr=[True] * 7 + [False] * 2)
    lengths = [0 if text is None else len(text.ids) for text in model.text.read(batch)]
    groups = model.passes(batch, 100)
    assert sorted(row for group in groups for row in group) == list(range(9))
    assert 1 < len(groups) < 9
    for group in groups:
        longest = max(lengths[row] for row in group)
        assert len(group) == 1 or longest * len(group) <= 100


def test_what_the_length_cut_is_told_once(build, make_batch):
    model = build("note_llm", max_length=16)
    batch = make_batch(rows=4)
    model.eval()(batch)
    assert set(model.tally().values()) == {0}, "evaluation is not counted"
    model.train()(batch)
    counts = model.tally()
    assert counts["text_texts"] == 4
    assert counts["text_notes_cut"] > 0
    assert set(model.tally().values()) == {0}


def test_the_frozen_base_is_named_and_hashed(build, bases, make_base):
    def reference(folder, **options):
        options = {"random_weights": False, "adapter": "lora", **options}
        model = build("note_llm", backbone=str(folder), **options)
        return model, model.references().get("text")

    model, found = reference(bases["llama"])
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert found.names == model.state_dict().keys() - trained
    assert found.source == str(bases["llama"])
    assert len(found.digest()) == 64
    assert found.digest() == reference(bases["llama"])[1].digest()
    assert found.digest() != reference(make_base("llama", seed=1))[1].digest()
    assert reference(bases["llama"], adapter="full")[1].names == frozenset()
    assert reference(bases["llama"], random_weights=True)[1] is None


def test_the_head_is_as_transformers_has_it(build, bases):
    kinds = {name: build("note_llm", backbone=str(bases[name])) for name in bases}
    assert kinds["llama"].head.bias is None
    assert kinds["bert"].head.bias is not None


def test_no_text_of_a_note_is_in_an_exception(build, make_batch, monkeypatch):
    """Whatever fails on the way, the message and the traceback's own text are without it."""
    model = build("note_llm")
    batch = make_batch(rows=2)
    batch = replace(batch, notes=(f"{CANARY} fever", f"{CANARY} pain"))
    assert CANARY not in repr(batch)
    monkeypatch.setattr(
        model.text.model, "forward", lambda **inputs: torch.zeros(2) @ torch.zeros(3)
    )
    with pytest.raises(RuntimeError) as caught:
        model(batch)
    assert CANARY not in "".join(traceback.format_exception(caught.value))


def test_bad_options_are_refused():
    kind = registry.get("note_llm")
    with pytest.raises(ValueError, match="target_modules"):
        kind.Config(target_modules=())
    with pytest.raises(InputError, match=r"model\.backbone"):
        kind(kind.Config(backbone="/nowhere"), TaskSpec(name="x", kind="binary", labels=("a",)))
