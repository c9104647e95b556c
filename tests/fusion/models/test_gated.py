"""MMTM and DAFT."""

import pytest
import torch
from torch.nn import functional as F


def literal_mmtm(model, batch, row):
    """One patient through the module's equations, in evaluation mode, with an image."""
    length = int(batch.lengths[row])
    first, second = model.ehr_encoder.layers
    states, _ = first(batch.ehr[row : row + 1, :length])
    image = batch.cxr[batch.cxr_index.tolist().index(row)][None]
    network = model.cxr_encoder
    maps = network.run_stages(network.stem(image), 1, model.stage)
    squeezed = torch.cat((maps.mean((2, 3)), states.mean(1)), 1)
    hidden = torch.relu(model.mmtm.squeeze(squeezed))
    maps = maps * torch.sigmoid(model.mmtm.visual_gate(hidden))[:, :, None, None]
    states = states * torch.sigmoid(model.mmtm.series_gate(hidden))
    _, (last, _) = second(states)
    pooled = network.run_stages(maps, model.stage + 1, 4).mean((2, 3))
    joint = torch.cat((model.joint_projection(last[-1]), pooled), 1)
    return {
        "ehr": model.ehr_head(last[-1])[0],
        "cxr": model.cxr_head(pooled)[0],
        "joint": model.joint_head(joint)[0],
    }


@pytest.mark.parametrize("stage", [3, 4])
def test_mmtm_equals_one_patient_at_a_time(stage, build, make_batch):
    model = build("mmtm", stage=stage).eval()
    batch = make_batch(present_cxr=[True] * 4, lengths=[6, 3, 1, 4])
    output = model(batch)
    for row in range(4):
        expected = literal_mmtm(model, batch, row)
        for head, logits in expected.items():
            given = output.features[f"{head}_logits"][row]
            torch.testing.assert_close(given, logits, atol=1e-5, rtol=1e-5)
        late = (torch.sigmoid(expected["ehr"]) + torch.sigmoid(expected["cxr"])) / 2
        torch.testing.assert_close(torch.sigmoid(output.logits[row]), late, atol=1e-5, rtol=1e-5)


def test_mmtm_gates_are_between_0_and_1_at_full_width(build, make_batch):
    for stage, channels in ((3, 256), (4, 512)):
        model = build("mmtm", stage=stage, base_width=64, hidden=256).eval()
        assert model.mmtm.visual_gate.out_features == channels
        assert model.mmtm.series_gate.out_features == 256
        assert model.joint_head.in_features == 1024
        assert model(make_batch(rows=2)).logits.shape == (2, 3)


@pytest.mark.parametrize("head", ["joint", "ehr", "cxr"])
def test_mmtm_reports_the_head_chosen(head, build, make_batch):
    batch = make_batch(present_cxr=[True] * 4)
    output = build("mmtm", reported=head).eval()(batch)
    assert torch.equal(output.logits, output.features[f"{head}_logits"])


def test_mmtm_without_an_image_reports_the_series_alone(build, make_batch):
    batch = make_batch(present_cxr=[True, False, True, False])
    output = build("mmtm").eval()(batch)
    assert torch.equal(output.logits[1::2], output.features["ehr_logits"][1::2])
    assert not torch.equal(output.logits[0::2], output.features["ehr_logits"][0::2])


def test_mmtm_losses_are_those_of_its_three_heads(build, make_batch):
    batch = make_batch(present_cxr=[True, False, True, False])
    output = build("mmtm").eval()(batch)
    paired = batch.present["cxr"]
    for head, rows in (("ehr", slice(None)), ("joint", slice(None)), ("cxr", paired)):
        logits, targets = output.features[f"{head}_logits"][rows], batch.targets[rows]
        expected = F.binary_cross_entropy_with_logits(logits, targets) * len(logits)
        torch.testing.assert_close(output.terms[head].sum, expected)
    assert output.terms["cxr"].over == ("cxr",)


def test_mmtm_phases_update_their_own_branch_and_the_module(build):
    model = build("mmtm")
    groups = {phase.name: set(phase.parameters) for phase in model.phases}
    assert groups == {
        "ehr": {"ehr_encoder", "mmtm.squeeze", "mmtm.series_gate", "ehr_head"},
        "cxr": {"cxr_encoder", "mmtm.squeeze", "mmtm.visual_gate", "cxr_head"},
        "joint": {"ehr_encoder", "cxr_encoder", "mmtm", "joint_projection", "joint_head"},
    }
    assert [phase.terms for phase in model.phases] == [("ehr",), ("cxr",), ("joint",)]


@pytest.mark.parametrize("name", ["mmtm", "daft"])
def test_a_zero_image_for_missing_ones_changes_their_rows(name, build, make_batch):
    """DrFuse's comparison; batch norm has moved, so that a zero image is not encoded as zeros."""
    batch = make_batch(present_cxr=[True, False, True, False])
    plain, zeros = build(name), build(name, missing_image="zero_image")
    for _ in range(3):
        plain(batch)
    zeros.load_state_dict(plain.state_dict())
    first, second = plain.eval()(batch).logits, zeros.eval()(batch).logits
    same = torch.isclose(first, second, atol=1e-5).all(1)
    assert same.tolist() == [True, False, True, False]


@pytest.mark.parametrize("stage", [3, 4])
def test_daft_equals_one_patient_at_a_time(stage, build, make_batch):
    model = build("daft", stage=stage).eval()
    batch = make_batch(present_cxr=[True] * 4, lengths=[6, 3, 1, 4])
    logits = model(batch).logits
    first, second = model.ehr_encoder.layers
    for row in range(4):
        states, _ = first(batch.ehr[row : row + 1, : batch.lengths[row]])
        squeezed = torch.cat((model.cxr_encoder(batch.cxr[row][None]), states.mean(1)), 1)
        scale, shift = model.daft.affine(torch.relu(model.daft.squeeze(squeezed))).chunk(2, 1)
        _, (last, _) = second(scale * states + shift)
        torch.testing.assert_close(logits[row], model.ehr_head(last[-1])[0], atol=1e-5, rtol=1e-5)


def test_daft_with_scale_one_and_shift_zero_is_the_lstm(build, make_batch, monkeypatch):
    model, lstm = build("daft").eval(), build("lstm").eval()
    lstm.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k.startswith(("ehr_encoder", "ehr_head"))}
    )
    batch = make_batch(present_cxr=[True] * 4)
    assert not torch.allclose(model(batch).logits, lstm(batch).logits, atol=1e-4)
    monkeypatch.setattr(
        model.daft, "forward", lambda visual, series: (torch.ones_like(series), 0 * series)
    )
    torch.testing.assert_close(model(batch).logits, lstm(batch).logits)


@pytest.mark.parametrize(("stage", "channels"), [(3, 256), (4, 512)])
def test_daft_ends_its_image_network_at_its_stage(stage, channels, build):
    model = build("daft", stage=stage, base_width=64, hidden=256)
    assert model.cxr_encoder.channels == channels
    assert hasattr(model.cxr_encoder, "layer4") == (stage == 4)
    assert model.daft.squeeze.out_features == {256: 38, 512: 75}[channels]
