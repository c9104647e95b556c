from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from data.tasks import task_spec
from fusion import registry
from fusion.losses.alignment import bernoulli_jsd, one_sided_jsd

ALL, NONE, SOME = [True] * 4, [False] * 4, [True, False, True, False]
PAIRED = ("ehr", "cxr")


def test_sizes_at_the_papers_numbers():
    model = registry.get("drfuse")
    built = model(model.Config(name="drfuse"), task_spec("phenotyping_48h"))
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in built.named_children()}
    encoder = built.ehr_encoder
    layers = sum(p.numel() for m in (encoder.common, encoder.branches) for p in m.parameters())
    assert round(layers / 1e6, 2) == 3.95
    assert round(sizes["shared_projection"] / 1e6, 2) == 0.33
    assert round(sizes["attention"] / 1e6, 2) == 1.78
    assert round(sizes["cxr_encoder"] / 1e6) == 48
    assert [len(list(head.parameters())) for head in built.aux_heads] == [4, 4, 4]


def literal(model, batch, row):
    """The representations, prediction and losses of one paired patient by the paper's equations."""
    ehr = model.ehr_encoder(
        batch.ehr[row : row + 1, : batch.lengths[row]], batch.lengths[row][None]
    )
    image = batch.cxr[batch.cxr_index.tolist().index(row)][None]
    twin = model.cxr_encoder
    ehr_shared = model.shared_projection(ehr[0, 0])
    cxr_shared = model.shared_projection(twin.shared_projection(twin.shared(image))[0])
    p, q = torch.sigmoid(ehr_shared), torch.sigmoid(cxr_shared)
    m = (p + q) / 2
    shared = torch.log(m / (1 - m))
    stack = torch.stack((ehr[0, 1], shared, twin.distinct_projection(twin.distinct(image))[0]))
    fused, attention = model.attention(stack[None], torch.ones(1, 3, dtype=torch.bool))
    logits = (fused[0] * model.head.weight).sum(1) + model.head.bias
    y = batch.targets[row]
    aux = torch.stack([_bce(head(h), y) for head, h in zip(model.aux_heads, stack, strict=True)])
    kl = sum(x * torch.log(x / m) + (1 - x) * torch.log((1 - x) / (1 - m)) for x in (p, q))
    terms = {
        "jsd": kl.sum() / 2,
        "orth_ehr": F.cosine_similarity(ehr_shared, stack[0], 0).abs(),
        "orth_cxr": F.cosine_similarity(cxr_shared, stack[2], 0).abs(),
        "aux_ehr": aux[0].mean(),
        "aux_shared": aux[1].mean(),
        "aux_cxr": aux[2].mean(),
        "ranking": _ranking(attention[0], aux.T),
    }
    return logits, terms


def _bce(logits, y):
    p = torch.sigmoid(logits)
    return -(y * torch.log(p) + (1 - y) * torch.log(1 - p))


def _ranking(attention, losses):
    total = 0.0
    for c in range(len(attention)):
        for i in range(3):
            for j in range(3):
                if losses[c, i] < losses[c, j]:
                    total = total + (attention[c, j] - attention[c, i]).clamp_min(0)
    return total / (2 * len(attention))


def test_predictions_and_terms_equal_the_equations_one_patient_at_a_time(build, make_batch):
    model = build("drfuse").eval()
    batch = make_batch(present_cxr=ALL, lengths=[6, 1, 3, 5])
    output = model(batch)
    sums = dict.fromkeys(output.terms, 0.0)
    for row in range(4):
        logits, terms = literal(model, batch, row)
        torch.testing.assert_close(output.logits[row], logits, atol=1e-5, rtol=1e-4)
        sums = {name: sums[name] + terms[name] for name in sums}
    for name, term in output.terms.items():
        torch.testing.assert_close(term.sum, torch.as_tensor(sums[name]), atol=1e-4, rtol=1e-3)
        assert term.scale == (1.0 if name in ("jsd", "orth_ehr", "orth_cxr") else 0.5)


def test_a_missing_image_has_no_attention_no_say_and_no_gradient(build, make_batch):
    model = build("drfuse")
    batch = make_batch(present_cxr=SOME)
    output = model(batch)
    attention = output.features["attention"]
    assert attention.shape == (4, 3, 3)
    assert not attention[1::2, :, 2].any()
    assert (attention[0::2] > 0).all()
    torch.testing.assert_close(attention.sum(-1), torch.ones(4, 3))
    assert torch.equal(output.features["shared"][1::2], output.features["ehr_shared"][1::2])
    output.logits[1::2].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.cxr_encoder.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.ehr_encoder.parameters())


def test_unpaired_rows_keep_only_the_prediction_and_orthogonality_of_the_series(build, make_batch):
    """Eq 13: every other term has value 0 and gradient 0."""
    model = build("drfuse")
    output = model(make_batch(present_cxr=NONE))
    assert output.terms["orth_ehr"].sum > 0
    assert output.terms["orth_ehr"].over == ("ehr",)
    for name, term in output.terms.items():
        if name == "orth_ehr":
            continue
        assert term.over == PAIRED
        assert term.sum.item() == 0.0
        gradients = torch.autograd.grad(
            term.sum, list(model.parameters()), retain_graph=True, allow_unused=True
        )
        assert not any(g is not None and g.any() for g in gradients)


def test_adding_unpaired_rows_changes_no_paired_term(build, make_batch):
    model = build("drfuse").eval()
    mixed = make_batch(present_cxr=SOME)
    paired = replace(
        mixed,
        ehr=mixed.ehr[0::2],
        lengths=mixed.lengths[0::2],
        cxr_index=torch.tensor([0, 1]),
        present={m: mask[0::2] for m, mask in mixed.present.items()},
        targets=mixed.targets[0::2],
        rows=mixed.rows[0::2],
    )
    some, all_paired = model(mixed).terms, model(paired).terms
    for name, term in some.items():
        same = torch.allclose(term.sum, all_paired[name].sum, atol=1e-5)
        assert same == (name != "orth_ehr"), name


def test_with_aux_unpaired_rows_train_the_first_two_heads(build, make_batch):
    batch = make_batch(present_cxr=NONE)
    terms = build("drfuse", unpaired_terms="with_aux").eval()(batch).terms
    for name in ("aux_ehr", "aux_shared"):
        assert terms[name].over == ("ehr",)
        assert terms[name].sum > 0
    assert terms["aux_cxr"].over == PAIRED
    assert terms["aux_cxr"].sum == 0


def test_the_one_sided_form_over_all_encoded_rows_is_the_codes(build, make_batch):
    """p-terms only, over every row where missing images are zero images, by the paired count."""
    batch = make_batch(present_cxr=SOME)
    full = build("drfuse").eval()(batch)
    code = build("drfuse", jsd="one_sided").eval()(batch)
    every = build("drfuse", jsd="one_sided", missing_image="zero_image").eval()(batch)
    for output, form, rows in (
        (full, bernoulli_jsd, slice(0, None, 2)),
        (code, one_sided_jsd, slice(0, None, 2)),
        (every, one_sided_jsd, slice(None)),
    ):
        features = output.features
        expected = form(features["ehr_shared"][rows], features["cxr_shared"][rows]).sum()
        torch.testing.assert_close(output.terms["jsd"].sum, expected)
        assert output.terms["jsd"].over == PAIRED
    assert not torch.isclose(full.terms["jsd"].sum, code.terms["jsd"].sum)
    assert not torch.isclose(every.terms["jsd"].sum, code.terms["jsd"].sum)
    torch.testing.assert_close(every.logits, full.logits, atol=1e-5, rtol=1e-5)


def test_mse_alignment_also_pools_by_the_mean(build, make_batch):
    batch = make_batch(present_cxr=SOME)
    output = build("drfuse", alignment="mse").eval()(batch)
    ehr, cxr = (output.features[name][0::2] for name in ("ehr_shared", "cxr_shared"))
    torch.testing.assert_close(output.features["shared"][0::2], (ehr + cxr) / 2)
    torch.testing.assert_close(output.terms["mse"].sum, 2 * F.mse_loss(ehr, cxr))
    assert "jsd" not in output.terms


def test_ablations_by_config(build, make_batch):
    batch = make_batch(present_cxr=ALL)
    assert "ranking" not in build("drfuse", ranking=False)(batch).terms
    terms = build("drfuse", lambda1=0.0, lambda2=0.0, lambda3=0.25)(batch).terms
    scales = {name: term.scale for name, term in terms.items()}
    assert scales == {
        "jsd": 0.0,
        "orth_ehr": 0.0,
        "orth_cxr": 0.0,
        "aux_ehr": 0.25,
        "aux_shared": 0.25,
        "aux_cxr": 0.25,
        "ranking": 0.25,
    }


def test_switches_of_structure_change_the_network(build, make_batch):
    batch = make_batch(present_cxr=ALL)
    plain, linear = build("drfuse"), build("drfuse", aux_head="linear")
    assert [len(list(head.parameters())) for head in linear.aux_heads] == [2, 2, 2]
    assert len(list(plain.aux_heads[0].parameters())) == 4
    shared = build("drfuse", stem="shared")
    assert not hasattr(shared.cxr_encoder.distinct, "conv1")
    assert shared(batch).logits.shape == (4, 3)
    wide = build("drfuse", rank_margin=0.5)(batch).terms["ranking"].sum
    assert wide > plain(batch).terms["ranking"].sum


def test_an_image_alone_is_predicted_from_its_two_representations(build, make_batch):
    model = build("drfuse").eval()
    batch = make_batch(present_cxr=ALL, present_ehr=[True, False, False, True])
    output = model(batch)
    attention = output.features["attention"]
    assert not attention[1:3, :, 0].any()
    assert (attention[1:3, :, 1:] > 0).all()
    assert torch.equal(output.features["shared"][1], output.features["cxr_shared"][1])
    other = model(replace(batch, ehr=batch.ehr + 1.0))
    torch.testing.assert_close(other.logits[1:3], output.logits[1:3])


def test_attention_learns_where_each_label_comes_from(build, make_batch):
    """Label a depends on the image alone, label b on the series alone."""
    model = build("drfuse", seed=1, labels=("a", "b"), hidden=16, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(70):
        batch = planted(make_batch, seed=step)
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    batch = planted(make_batch, seed=10_000, rows=128)
    with torch.no_grad():
        output = model.eval()(batch)
    accuracy = ((output.logits > 0) == batch.targets.bool()).float().mean(0)
    assert (accuracy > 0.9).all()
    ehr, _, cxr = output.features["attention"].mean(0).T
    assert cxr[0] > 0.8
    assert ehr[1] > 0.8


def planted(make_batch, seed, rows=32):
    batch = make_batch(
        rows=rows, steps=3, image_size=16, classes=2, present_cxr=[True] * rows, seed=seed
    )
    signs = 2 * batch.targets - 1
    series = 0.3 * batch.ehr
    series[:, :, :8] += signs[:, 1, None, None]
    valid = torch.arange(3) < batch.lengths[:, None]
    images = 0.3 * batch.cxr
    images[:, :, 4:12, 4:12] += 1.5 * signs[:, 0, None, None, None]
    return replace(batch, ehr=series * valid[:, :, None], cxr=images)


def loss_of(model, batch):
    output = model(batch)
    loss = F.binary_cross_entropy_with_logits(output.logits, batch.targets)
    for term in output.terms.values():
        loss = loss + term.scale * term.sum / len(batch)
    return loss


@pytest.mark.parametrize("field", ["lambda1", "rank_margin"])
def test_negative_weights_are_refused(field, build):
    with pytest.raises(ValueError, match=field):
        build("drfuse", **{field: -0.1})
