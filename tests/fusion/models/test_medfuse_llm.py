"""MEDFuse on notes and labs: what each update moves, what lambda weighs, what needs both."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.schema import MODALITIES, N_FEATURES, Batch
from data.tasks import TaskSpec
from fusion import registry
from fusion.losses.rows import bce_by_class
from fusion.metrics.ranking import auroc
from fusion.training.optim import OptimConfig
from fusion.training.optimizers import build_optimizers

NAME = "medfuse_llm"


def loss_of(output, batch, phase):
    task = bce_by_class(output.logits, batch.targets).mean()
    terms = {name: term.scale * term.sum / len(batch) for name, term in output.terms.items()}
    return sum((terms | {"task": task})[name] for name in phase.terms)


def train(model, batch, steps=1, lr=1e-2, phases=None):
    """Steps as the loop takes them: each phase its own pass and optimizer."""
    phases = phases or model.phases
    optimizers = build_optimizers(model, phases, OptimConfig(lr=lr))
    for _ in range(steps):
        for phase, optimizer in zip(phases, optimizers, strict=True):
            for _ in range(phase.repeats):
                model.zero_grad(set_to_none=True)
                loss_of(model(batch), batch, phase).backward()
                optimizer.step()
    return model


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(before, after):
    return {name.split(".")[0] for name, value in before.items() if not value.equal(after[name])}


def test_each_phase_moves_its_own_parameters_only(build, make_batch):
    model, batch = build(NAME), make_batch(rows=6)
    critic, network = model.phases
    assert (critic.repeats, build(NAME, critic_updates=5).phases[0].repeats) == (1, 5)
    start = state(model)
    train(model, batch, phases=[critic])
    middle = state(model)
    assert moved(start, middle) == {"critic"}
    train(model, batch, phases=[network])
    assert moved(middle, state(model)) == {"text", "labs", "no_labs", "fusion", "head"}


def test_theta_gets_no_gradient_from_the_network_s_loss_nor_the_network_from_theta_s(
    build, make_batch
):
    """Sanity check 30."""
    model, batch = build(NAME), make_batch(rows=6)
    critic, network = model.phases
    for phase, own in ((critic, True), (network, False)):
        model.zero_grad(set_to_none=True)
        loss_of(model(batch), batch, phase).backward()
        for name, parameter in model.named_parameters():
            if name.startswith("critic.") != own:
                assert parameter.grad is None, name
    model.zero_grad(set_to_none=True)
    output = model(batch)
    output.terms["vclub"].sum.backward()
    for part in (model.fusion.streams, model.fusion.tokens[0], model.fusion.tokens[1]):
        assert all(parameter.grad.any() for parameter in part.parameters())


def test_the_terms_are_the_literal_double_sum_and_likelihood(build, make_batch):
    model, batch = build(NAME).eval(), make_batch(rows=5)
    output = model(batch)
    features = output.features
    x = torch.cat((features["text_specific"], features["labs_specific"]), 1)
    y = F.layer_norm(features["shared"], (8,))
    q = torch.distributions.Normal(model.critic(x)[0], (0.5 * model.critic(x)[1]).exp())
    pairs = torch.stack([q.log_prob(row).sum(1) for row in y])
    expected = (pairs.diagonal()[None] - pairs).sum() / 25
    torch.testing.assert_close(output.terms["vclub"].sum / 5, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.terms["nll"].sum, -pairs.diagonal().sum())
    assert output.terms["vclub"].scale == 0.1
    placeholder = replace(batch, rows=np.zeros(0, np.int64))
    assert not model(placeholder).terms["vclub"].sum.any()


def test_the_bound_does_not_shrink_with_the_scale_of_what_is_shared(build, make_batch):
    model, batch = build(NAME).eval(), make_batch(rows=5)
    before = model(batch).terms["vclub"].sum
    full = model.fusion.forward

    def scaled(first, second):
        s_a, s_b, s_c = full(first, second)
        return s_a, s_b, 0.1 * s_c

    model.fusion.forward = scaled
    torch.testing.assert_close(model(batch).terms["vclub"].sum, before, rtol=0.01, atol=0)


def test_lambda_0_is_the_run_without_an_mi_loss_bit_for_bit(build, make_batch):
    """Sanity check 32: the other run trains a critic, its network the focal loss alone."""
    batch = make_batch(rows=6)
    zero = train(build(NAME, mi_weight=0.0, dropout=0.0), batch, 4)
    without = build(NAME, dropout=0.0)
    critic, network = without.phases
    train(without, batch, 4, phases=[critic, replace(network, terms=("focal",))])
    assert [phase.terms for phase in zero.phases] == [("focal",)]
    assert set(zero(batch).terms) == {"focal"}
    own = state(zero)
    assert moved(own, state(without)) == {"critic"}
    assert "critic" not in moved(state(build(NAME, dropout=0.0)), own)
    weighed = state(train(build(NAME, dropout=0.0), batch, 4))
    assert "fusion" in moved(own, weighed)


def test_one_pass_trains_network_and_critic_each_by_its_own(build, make_batch):
    """Gradients of `joint` are those of the two phases; `printed` pulls theta the other way."""
    batch = make_batch(rows=6)

    def gradients(model, phase):
        model.zero_grad(set_to_none=True)
        loss_of(model(batch), batch, phase).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    alternating = build(NAME, dropout=0.0)
    apart = {}
    for phase in alternating.phases:
        apart |= gradients(alternating, phase)
    joint = build(NAME, dropout=0.0, mi_update="joint")
    found = gradients(joint, *joint.phases)
    assert found.keys() == apart.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, apart[name], atol=1e-6, rtol=1e-4)
    printed = build(NAME, dropout=0.0, mi_update="printed")
    pulled = gradients(printed, *printed.phases)
    name = "critic.mean.second.bias"
    # The bias of q's mean: vCLUB asks nothing of it in the mean, the likelihood all.
    assert F.cosine_similarity(pulled[name], apart[name], 0) < -0.5
    assert not torch.allclose(pulled["fusion.positions"], apart["fusion.positions"], rtol=0.01)


def test_what_the_text_prints_makes_the_critic_worse(build, make_batch):
    batch = make_batch(rows=8)
    worse = {}
    for update in ("alternating", "printed"):
        model = train(build(NAME, dropout=0.0, mi_update=update), batch, 20)
        term = model.eval()(batch).terms["nll"]
        worse[update] = term.sum.item() / len(batch)
    assert worse["printed"] > worse["alternating"] + 1


SWITCHES = {
    "fusion": "concat",
    "append_one": True,
    "layers": 2,
    "use_labs": False,
    "text": "notes",
    "focal_gamma": 0.0,
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_changes_what_is_trained(build, make_batch, switch):
    batch = make_batch(rows=6)
    models = [
        train(build(NAME, dropout=0.0, **options), batch, 2)
        for options in ({}, {switch: SWITCHES[switch]})
    ]
    plain, other = (model.eval()(batch).logits for model in models)
    assert (plain - other).abs().max() > 1e-4


def test_without_disentangling_there_is_no_mutual_information(build, make_batch):
    model = build(NAME, fusion="concat")
    output = model(make_batch())
    assert set(output.terms) == {"focal"}
    assert not hasattr(model, "critic")
    plain = build(NAME, fusion="concat", loss="bce")
    assert [phase.terms for phase in plain.phases] == [("task",)]
    assert not plain(make_batch()).terms


def test_rows_without_results_have_the_learned_vector(build, make_batch):
    model, batch = build(NAME).eval(), make_batch(rows=5)
    has = batch.labs_observed.any(1)
    assert has.tolist() == [True, False, True, True, True]
    before = model(batch)
    torch.testing.assert_close(before.features["labs"][1], model.no_labs.vector)
    with torch.no_grad():
        model.no_labs.vector.neg_()
    changed = (model(batch).logits - before.logits).abs().amax(1) > 1e-6
    assert changed.tolist() == (~has).tolist()
    nobody = build(NAME, use_labs=False).eval()
    assert (nobody(batch).features["labs"] == nobody.no_labs.vector).all()
    spoiled = replace(batch, labs=torch.where(batch.labs_observed, batch.labs, torch.nan))
    model = build(NAME).eval()
    assert torch.equal(model(spoiled).logits, model(batch).logits)


def test_rows_without_text_are_told_from_their_results(build, make_batch):
    model, batch = build(NAME).eval(), make_batch(rows=5)
    bare = batch.without("notes", torch.ones(5, dtype=torch.bool))
    bare = replace(bare, lab_texts=())
    output = model(bare)
    assert not output.features["text"].any()
    other = replace(bare, labs=torch.where(bare.labs_observed, 1 - bare.labs, 0.0))
    changed = (model(other).logits - output.logits).abs().amax(1) > 1e-6
    assert changed.tolist() == batch.labs_observed.any(1).tolist()


def test_bad_options_are_refused(build, make_batch):
    kind = registry.get(NAME)
    with pytest.raises(ValueError, match=r"heads \(3\) must divide width \(8\)"):
        kind.Config(**{**kind.TINY, "heads": 3})
    for weight in (-0.1, 1.1):
        with pytest.raises(ValueError, match="mi_weight"):
            kind.Config(mi_weight=weight)
    with pytest.raises(Exception, match=r"5 columns, but the model reads 4: set model\.items"):
        build(NAME, items=4)(make_batch())


PLANTED = TaskSpec(name="planted", kind="binary", labels=("fever or a high result, not both",))


def planted(rows, seed):
    """The label is the exclusive or of a word of the note and of the first result's size."""
    rng = np.random.default_rng(seed)
    fever, high = rng.random(rows) < 0.5, rng.random(rows) < 0.5
    labs = rng.random((rows, 3)).astype(np.float32)
    labs[:, 0] = 0.4 * rng.random(rows) + 0.6 * high
    return Batch(
        ehr=torch.zeros(rows, 1, N_FEATURES),
        lengths=torch.ones(rows, dtype=torch.int64),
        cxr=torch.zeros(0, 3, 32, 32),
        cxr_index=torch.zeros(0, dtype=torch.int64),
        present={
            name: torch.full((rows,), name in ("notes", "labs"), dtype=torch.bool)
            for name in MODALITIES
        },
        targets=torch.from_numpy((fever ^ high).astype(np.float32))[:, None],
        cxr_targets=torch.zeros(0, 14),
        rows=np.arange(rows),
        notes=tuple("fever" if each else "cough" for each in fever),
        notes_index=torch.arange(rows),
        labs=torch.from_numpy(labs),
        labs_observed=torch.ones(rows, 3, dtype=torch.bool),
    )


def planted_auroc(**options):
    torch.manual_seed(0)
    kind = registry.get(NAME)
    model = kind(kind.Config(**{**kind.TINY, "dropout": 0.0, **options}), PLANTED)
    rng = np.random.default_rng(0)
    phases = model.phases
    optimizers = build_optimizers(model, phases, OptimConfig(lr=3e-3))
    whole = planted(256, 1)
    for _ in range(120):
        chosen = rng.choice(256, 32, replace=False)
        batch = replace(
            whole,
            **{
                name: getattr(whole, name)[chosen]
                for name in ("ehr", "lengths", "targets", "rows", "labs", "labs_observed")
            },
            present={name: mask[chosen] for name, mask in whole.present.items()},
            notes=tuple(whole.notes[row] for row in chosen),
            notes_index=torch.arange(32),
        )
        for phase, optimizer in zip(phases, optimizers, strict=True):
            model.zero_grad(set_to_none=True)
            loss_of(model(batch), batch, phase).backward()
            optimizer.step()
    test = planted(512, 2)
    with torch.no_grad():
        scores = model.eval()(test).logits.numpy()
    return float(auroc(test.targets.numpy(), scores)[0])


@pytest.mark.parametrize("fusion", ["disentangled", "concat"])
def test_what_needs_both_branches_is_learnt_by_both_together(fusion):
    assert planted_auroc(fusion=fusion) > 0.95


@pytest.mark.parametrize("alone", [{"use_labs": False}, {"text": "labs"}])
def test_what_needs_both_branches_is_not_learnt_by_one(alone):
    assert planted_auroc(**alone) < 0.65
