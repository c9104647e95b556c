"""What every registered model must hold to. A new model's file is found; nothing is edited here."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load, save

from data.tasks import TaskSpec, task_spec
from fusion import registry
from fusion.tasks import Task

if TYPE_CHECKING:
    from data.schema import Batch
    from fusion.model import FusionModel, Output, Phase

SPEC = TaskSpec(name="contract", kind="multilabel", labels=("a", "b", "c"))
FULL = (True, True, True, True)
NONE = (False, False, False, False)
PATTERNS = {
    "all": (FULL, FULL),
    "no image": (NONE, FULL),
    "one image": ((False, False, True, False), FULL),
    "some images": ((True, False, True, False), FULL),
    "no series": (FULL, NONE),
    "one series": (FULL, (False, True, False, False)),
    "nothing": (NONE, NONE),
    "mixed": ((True, False, True, False), (True, True, False, False)),
}


def build(name: str, seed: int = 0) -> FusionModel:
    torch.manual_seed(seed)
    model = registry.get(name)
    return model(model.tiny(), SPEC)


def count(batch: Batch, over: tuple[str, ...]) -> int:
    return sum(all(batch.present[m][row] for m in over) for row in range(len(batch)))


def loss_of(model: FusionModel, output: Output, batch: Batch, phase: Phase) -> torch.Tensor:
    terms = {"task": Task(SPEC).loss(output.logits, batch), **output.terms}
    values = dict(zip(model.counted, model.counts(batch).tolist(), strict=True))
    means = [
        terms[name].scale
        * terms[name].sum
        / max(1, values[name] if name in values else count(batch, terms[name].over))
        for name in phase.terms or terms
    ]
    return torch.stack(means).sum()


def updated(model: FusionModel, phase: Phase) -> dict[str, torch.nn.Parameter]:
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and (not phase.parameters or name.startswith(tuple(f"{p}." for p in phase.parameters)))
    }


@pytest.fixture(params=registry.names())
def name(request) -> str:
    return request.param


def test_is_registered_under_its_file_name_with_documented_numbers(name):
    model = registry.get(name)
    assert model.name == name
    assert model.__module__ == f"fusion.models.{name}"
    assert set(model.modalities) <= {"ehr", "cxr", "notes", "labs"}
    assert model.Config(name=name).name == name
    undocumented = [
        field
        for field, info in model.Config.model_fields.items()
        if field != "name" and not info.description
    ]
    assert undocumented == []
    assert inspect.getdoc(model)


def test_logits_and_features_have_a_row_each(name, make_batch):
    output = build(name)(make_batch())
    assert output.logits.shape == (4, 3)
    assert output.logits.dtype == torch.float32
    assert output.features
    assert {len(value) for value in output.features.values()} == {4}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("training", [True, False])
def test_every_pattern_of_missing_modalities(name, pattern, training, make_batch):
    """Finite loss, and a gradient (maybe zero) for all that a phase updates: no rank may differ."""
    cxr, ehr = PATTERNS[pattern]
    batch = make_batch(present_cxr=cxr, present_ehr=ehr)
    model = build(name).train(training)
    for phase in model.phases:
        parameters = updated(model, phase)
        assert parameters
        model.zero_grad(set_to_none=True)
        output = model(batch)
        loss = loss_of(model, output, batch, phase)
        assert torch.isfinite(loss)
        assert torch.isfinite(output.logits).all()
        loss.backward()
        assert [n for n, p in parameters.items() if p.grad is None] == []
        assert all(p.grad.isfinite().all() for p in parameters.values())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_submodule_is_called_in_the_same_order_whatever_is_missing(name, pattern, make_batch):
    """Sharded weights are gathered at each call: workers whose rows differ would wait for ever."""
    cxr, ehr = PATTERNS[pattern]
    usual = calls(build(name), make_batch())
    assert len(usual) > 2
    assert calls(build(name), make_batch(present_cxr=cxr, present_ehr=ehr)) == usual


def calls(model: FusionModel, batch: Batch) -> list[str]:
    order: list[str] = []
    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, path=path: order.append(path))
    model(batch)
    return order


def test_every_trainable_parameter_gets_a_gradient_from_a_phase_that_updates_it(name, make_batch):
    model = build(name)
    batch = make_batch(rows=8, present_cxr=[True] * 5 + [False] * 3)
    moved: set[str] = set()
    for phase in model.phases:
        model.zero_grad(set_to_none=True)
        loss_of(model, model(batch), batch, phase).backward()
        moved |= {
            n for n, p in updated(model, phase).items() if p.grad is not None and p.grad.any()
        }
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable - moved == set()


def test_phases_name_terms_and_submodules_that_exist(name, make_batch):
    model = build(name)
    terms = model(make_batch()).terms
    assert set(model.counted) <= set(terms)
    known = {"task", *terms}
    children = {child for child, _ in model.named_children()}
    for phase in model.phases:
        assert set(phase.terms) <= known
        assert {prefix.split(".")[0] for prefix in phase.parameters} <= children
    assert set(model.pretrained) <= children


@pytest.mark.parametrize("cxr", [True, False])
def test_a_batch_of_one_row_and_one_step(name, cxr, make_batch):
    batch = make_batch(rows=1, steps=1, present_cxr=[cxr])
    for training in (True, False):
        model = build(name).train(training)
        output = model(batch)
        assert output.logits.shape == (1, 3)
        for phase in model.phases:
            assert torch.isfinite(loss_of(model, output, batch, phase))


def test_evaluation_does_not_depend_on_the_other_rows(name, make_batch):
    model = build(name).eval()
    batch = make_batch(
        rows=5, present_cxr=[True, False, False, True, True], lengths=[6, 1, 3, 2, 5]
    )
    together = model(batch).logits
    for row in range(5):
        alone = model(single(batch, row)).logits
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


def single(batch: Batch, row: int) -> Batch:
    images, noted = batch.cxr_index == row, batch.notes_index == row
    return replace(
        batch,
        ehr=batch.ehr[row : row + 1, : batch.lengths[row]],
        lengths=batch.lengths[row : row + 1],
        cxr=batch.cxr[images],
        cxr_index=torch.zeros(int(images.sum()), dtype=torch.int64),
        present={m: mask[row : row + 1] for m, mask in batch.present.items()},
        targets=batch.targets[row : row + 1],
        cxr_targets=batch.cxr_targets[images],
        rows=batch.rows[row : row + 1],
        notes=tuple(note for note, own in zip(batch.notes, noted, strict=True) if own),
        notes_index=torch.zeros(int(noted.sum()), dtype=torch.int64),
        lab_texts=batch.lab_texts[row : row + 1],
        labs=batch.labs[row : row + 1],
        labs_observed=batch.labs_observed[row : row + 1],
        draws=batch.draws[row : row + 1],
    )


def test_padding_is_never_read(name, make_batch):
    model = build(name).eval()
    batch = make_batch(lengths=[6, 4, 1, 2])
    garbage = torch.full((4, 9, batch.ehr.shape[2]), torch.nan)
    for row, length in enumerate(batch.lengths.tolist()):
        garbage[row, :length] = batch.ehr[row, :length]
    padded = model(replace(batch, ehr=garbage)).logits
    torch.testing.assert_close(padded, model(batch).logits, atol=1e-6, rtol=1e-5)


def test_the_content_of_a_missing_series_is_never_read(name, make_batch):
    """Withholding keeps the tensor: its values must change neither outputs nor gradients."""
    batch = make_batch(lengths=[6, 5, 4, 3])
    rows = torch.tensor([False, True, False, True])
    withheld = batch.without("ehr", rows)
    spoiled = replace(
        withheld,
        ehr=torch.where(rows[:, None, None], torch.nan, withheld.ehr),
        lengths=torch.where(rows, 2, withheld.lengths),
    )
    assert_same_pass(name, withheld, spoiled)


def test_the_content_of_a_withheld_image_is_never_read(name, make_batch):
    rows = torch.tensor([False, True, True, False])
    batch = make_batch(present_cxr=FULL)
    other = replace(batch, cxr=batch.cxr.clone())
    other.cxr[1:3] = torch.randn(2, *batch.cxr.shape[1:])
    assert_same_pass(name, batch.without("cxr", rows), other.without("cxr", rows))


def assert_same_pass(name: str, first: Batch, second: Batch) -> None:
    results = []
    for batch in (first, second):
        model = build(name)
        torch.manual_seed(7)
        output = model(batch)
        loss_of(model, output, batch, model.phases[-1]).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({"logits": output.logits, **gradients, **dict(model.named_buffers())})
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


def test_saved_and_loaded_into_other_weights_it_predicts_the_same(name, make_batch):
    batch = make_batch()
    source, target = build(name, seed=0), build(name, seed=1)
    source(batch)
    source.eval()
    target.eval()
    assert not torch.equal(source(batch).logits, target(batch).logits)
    target.load_state_dict(load(save(source.state_dict())))
    assert torch.equal(source(batch).logits, target(batch).logits)


def test_the_loss_falls_on_one_batch(name, make_batch):
    model = build(name)
    batch = make_batch(rows=6, present_cxr=[True] * 4 + [False] * 2)
    optimizers = [torch.optim.Adam(updated(model, p).values(), lr=1e-2) for p in model.phases]
    history = []
    for _ in range(25):
        for phase, optimizer in zip(model.phases, optimizers, strict=True):
            optimizer.zero_grad()
            loss = loss_of(model, model(batch), batch, phase)
            loss.backward()
            optimizer.step()
        history.append(loss.item())
    assert math.fsum(history[-3:]) < 0.8 * math.fsum(history[:3])


def test_bfloat16_autocast_gives_float32_logits_near_those_of_float32(name, make_batch):
    model = build(name).eval()
    batch = make_batch(present_cxr=[True, False, True, True])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = model(batch).logits
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, model(batch).logits, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", [n for n in registry.names() if registry.get(n).image_encoder])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_its_image_encoders_outputs_may_stand_for_the_images(name, pattern, make_batch):
    cxr, ehr = PATTERNS[pattern]
    model = build(name).eval()
    batch = make_batch(present_cxr=cxr, present_ehr=ehr)
    encoder = model.get_submodule(model.image_encoder)
    usual = model(batch)
    with torch.no_grad():
        outputs = encoder(batch.cxr) if len(batch.cxr) else encoder(torch.zeros(2, 3, 32, 32))[:0]
    encoder.forward = lambda given: given
    found = model(replace(batch, cxr=outputs))
    torch.testing.assert_close(found.logits, usual.logits, atol=1e-6, rtol=0)
    for key, term in usual.terms.items():
        torch.testing.assert_close(found.terms[key].sum, term.sum, atol=1e-6, rtol=0)


@pytest.mark.parametrize("task", ["mortality", "phenotyping", "radiology"])
def test_it_has_a_logit_for_each_label_of_a_task(name, task, make_batch):
    spec = task_spec(task)
    model = registry.get(name)
    images_only = [False] * 4 if spec.unit == "image" else None
    batch = make_batch(classes=len(spec.labels), present_ehr=images_only, present_cxr=FULL, steps=1)
    logits = model(model.tiny(), spec)(batch).logits
    assert logits.shape == (4, len(spec.labels))
