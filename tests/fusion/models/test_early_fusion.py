import pytest
import torch
from torch.nn import functional as F


def train(model, batch, steps=5):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(batch).logits, batch.targets).backward()
        optimizer.step()


def test_the_frozen_encoders_are_bit_identical_after_training(build, make_batch):
    model = build("early_fusion")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, make_batch(rows=6))
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {
        "fusion.projection.weight",
        "fusion.projection.bias",
        "fusion.missing",
        "fusion.head.weight",
        "fusion.head.bias",
    }
    assert any("running_mean" in name for name in before)


def test_joint_fusion_trains_everything_of_the_same_graph(build, make_batch):
    early, joint = build("early_fusion"), build("joint_fusion")
    joint.load_state_dict(early.state_dict())
    batch = make_batch(rows=6)
    torch.testing.assert_close(joint.eval()(batch).logits, early.eval()(batch).logits)
    train(joint, batch)
    before = early.state_dict()
    changed = {
        name for name, value in joint.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == set(before)


def test_training_mode_does_not_drop_out_of_the_frozen_series(build, make_batch):
    model = build("early_fusion", dropout=0.9).train()
    assert model.training
    batch = make_batch()
    assert torch.equal(model(batch).logits, model(batch).logits)


def test_it_asks_for_pretrained_encoders(build):
    assert build("early_fusion").pretrained == ("ehr_encoder", "cxr_encoder")
    assert build("joint_fusion").pretrained == ()


@pytest.mark.parametrize("name", ["early_fusion", "joint_fusion"])
def test_the_vector_for_a_missing_image_is_a_switch(name, build, make_batch):
    batch = make_batch(present_cxr=[True, False, False, True])
    learned, zeros = build(name).eval(), build(name, missing="zeros").eval()
    state = {k: v for k, v in learned.state_dict().items() if k != "fusion.missing"}
    zeros.load_state_dict(state)
    first, second = learned(batch).logits, zeros(batch).logits
    same = torch.isclose(first, second, atol=1e-6).all(1)
    assert same.tolist() == [True, False, False, True]
