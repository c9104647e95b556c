from dataclasses import replace

import pytest
import torch
from torch import nn

from data.tasks import task_spec
from fusion import registry

FAMILY = pytest.mark.parametrize("name", ["medfuse", "medfuse2", "joint_fusion", "unified"])


def norm_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.cxr_encoder.named_buffers()}


def without_rows(batch, kept):
    """The batch with only the rows in `kept`."""
    place = {row: new for new, row in enumerate(kept)}
    images = [i for i, row in enumerate(batch.cxr_index.tolist()) if row in place]
    return replace(
        batch,
        ehr=batch.ehr[kept],
        lengths=batch.lengths[kept],
        cxr=batch.cxr[images],
        cxr_index=torch.tensor([place[int(batch.cxr_index[i])] for i in images]),
        present={m: mask[kept] for m, mask in batch.present.items()},
        targets=batch.targets[kept],
        cxr_targets=batch.cxr_targets[images],
        rows=batch.rows[kept],
    )


def test_sizes_at_the_papers_numbers():
    model = registry.get("medfuse")
    built = model(model.Config(name="medfuse"), task_spec("phenotyping"))
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in built.named_children()}
    assert sizes["ehr_encoder"] == 868_352
    assert round(sizes["cxr_encoder"] / 1e6, 2) == 21.28
    assert sizes["projection"] == 512 * 256 + 256
    assert sizes["fusion"] == 1_576_960
    assert sizes["head"] == 512 * 25 + 25


def test_medfuse2_has_drfuses_encoders():
    model = registry.get("medfuse2")
    built = model(model.Config(name="medfuse2"), task_spec("phenotyping"))
    assert built.projection.weight.shape == (256, 2048)
    assert len(built.ehr_encoder.branches) == 1
    assert built.fusion.lstm.hidden_size == 512


@FAMILY
def test_without_images_nothing_of_the_image_path_gets_a_gradient(name, build, make_batch):
    model = build(name)
    model(make_batch(present_cxr=[False] * 4)).logits.sum().backward()
    for module in (
        model.cxr_encoder,
        getattr(model, "projection", None) or model.fusion.projection,
    ):
        for parameter in module.parameters():
            assert parameter.grad is None or not parameter.grad.any()
    assert any(p.grad is not None and p.grad.any() for p in model.ehr_encoder.parameters())


@FAMILY
def test_adding_rows_without_an_image_leaves_paired_rows_and_batch_norm_as_they_were(
    name, build, make_batch
):
    """In training mode: the outputs of paired rows and the running statistics are the same."""
    batch = make_batch(rows=6, present_cxr=[True, False, True, False, True, False])
    paired = [0, 2, 4]
    few, many = build(name, dropout=0.0), build(name, dropout=0.0)
    alone = few(without_rows(batch, paired)).logits
    together = many(batch).logits[paired]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    before, after = norm_buffers(few), norm_buffers(many)
    assert all(torch.equal(before[key], after[key]) for key in before)


@FAMILY
def test_zero_images_enter_batch_norm_as_in_the_released_code(name, build, make_batch):
    """The switch: statistics and paired outputs change, and so does nothing in evaluation mode."""
    batch = make_batch(rows=6, present_cxr=[True, False, True, False, True, False])
    plain = build(name, dropout=0.0)
    zeros = build(name, dropout=0.0, missing_image="zero_image")
    plain.eval(), zeros.eval()
    torch.testing.assert_close(plain(batch).logits, zeros(batch).logits, atol=1e-5, rtol=1e-5)
    plain.train(), zeros.train()
    first, second = plain(batch).logits, zeros(batch).logits
    assert not torch.allclose(first[[0, 2, 4]], second[[0, 2, 4]], atol=1e-4)
    before, after = norm_buffers(plain), norm_buffers(zeros)
    assert not torch.allclose(before["bn1.running_var"], after["bn1.running_var"], atol=1e-4)


def test_the_loss_has_no_gradient_with_respect_to_withheld_images(build, make_batch):
    batch = make_batch(present_cxr=[True] * 4)
    batch.cxr.requires_grad_()
    rows = torch.tensor([False, True, False, True])
    build("medfuse")(batch.without("cxr", rows)).logits.square().sum().backward()
    touched = batch.cxr.grad.flatten(1).any(1)
    assert touched.tolist() == [True, False, True, False]


def test_an_image_alone_is_a_sequence_of_one(build, make_batch):
    model = build("medfuse").eval()
    batch = make_batch(present_ehr=[False] * 4, present_cxr=[True, True, False, False])
    output = model(batch)
    projected = model.projection(model.cxr_encoder(batch.cxr))
    _, (hidden, _) = model.fusion.lstm(projected[:, None])
    torch.testing.assert_close(output.logits[:2], model.head(hidden[-1]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.logits[2], model.head.bias)


def test_a_row_with_an_image_uses_it(build, make_batch):
    model = build("medfuse").eval()
    batch = make_batch(present_cxr=[True] * 4)
    other = replace(batch, cxr=batch.cxr.flip(0))
    assert not torch.allclose(model(batch).logits, model(other).logits, atol=1e-4)
    withheld = batch.without("cxr", torch.ones(4, dtype=torch.bool))
    assert not torch.allclose(model(batch).logits, model(withheld).logits, atol=1e-4)
