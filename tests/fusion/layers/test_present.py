from dataclasses import replace

import pytest
import torch
from torch import nn

from data.errors import InputError
from fusion.layers.present import (
    keep_present,
    present_images,
    present_labs,
    present_series,
    valid_steps,
)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def statistics(encoder: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in encoder.buffers()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_present_rows_are_encoded_and_come_back_to_their_places(make_batch, encoder):
    batch = make_batch(rows=5, present_cxr=[False, True, True, False, True])
    with present_images(batch, encoder) as images:
        assert len(images.values) == 3
        encoded = encoder(images.values)
        scattered = images.scatter(encoded)
    assert torch.equal(scattered[[1, 2, 4]], encoded)
    assert not scattered[[0, 3]].any()
    assert torch.equal(images.gather(scattered), encoded)
    assert images.available.tolist() == [False, True, True, False, True]


def test_without_images_stand_ins_run_and_count_for_nothing(make_batch, encoder):
    batch = make_batch(present_cxr=[False] * 4)
    before = statistics(encoder)
    with present_images(batch, encoder) as images:
        encoded = encoder(images.values)
        scattered = images.scatter(encoded)
        gathered = images.gather(torch.ones(4, 7))
    assert len(encoded) == len(gathered) == 2
    assert torch.equal(scattered, torch.zeros(4, 4))
    scattered.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in encoder.parameters())
    assert same(before, statistics(encoder))


@pytest.mark.parametrize("images", [0, 1, 2])
def test_batch_norm_reads_its_running_statistics_below_two_images(images, make_batch, encoder):
    batch = make_batch(present_cxr=[row < images for row in range(4)])
    before = statistics(encoder)
    with present_images(batch, encoder) as rows:
        assert encoder[1].training == (images == 2)
        encoder(rows.values)
    assert encoder[1].training
    assert same(before, statistics(encoder)) == (images < 2)


def test_batch_norm_is_training_again_after_an_error(make_batch, encoder):
    batch = make_batch(present_cxr=[False] * 4)
    with pytest.raises(RuntimeError, match="boom"), present_images(batch, encoder):
        raise RuntimeError("boom")
    assert encoder[1].training


def test_evaluation_mode_is_left_alone(make_batch, encoder):
    encoder.eval()
    with present_images(make_batch(present_cxr=[False] * 4), encoder):
        pass
    assert not encoder[1].training


def test_zero_images_are_encoded_for_every_row_without_one(make_batch, encoder):
    batch = make_batch(present_cxr=[False, True, False, True])
    with present_images(batch, encoder, "zero_image") as images:
        assert torch.equal(images.values[[1, 3]], batch.cxr)
        assert not images.values[[0, 2]].any()
        assert images.scatter(encoder(images.values))[0].any()
    assert images.available.all()


def test_images_of_rows_marked_absent_are_dropped_after_encoding(make_batch, encoder):
    batch = make_batch(present_cxr=[True] * 4)
    batch.present["cxr"][2] = False
    with present_images(batch, encoder) as images:
        scattered = images.scatter(encoder(images.values))
    assert not scattered[2].any()
    assert scattered[1].any()


def test_series_hold_nothing_beyond_lengths_or_in_absent_rows(make_batch):
    batch = make_batch(rows=3, present_ehr=[True, False, True], lengths=[6, 6, 2])
    batch.ehr[1] = torch.nan
    batch.ehr[2, 2:] = torch.inf
    batch.lengths[1] = 5
    series, lengths = present_series(batch)
    assert lengths.tolist() == [6, 1, 2]
    assert torch.equal(series[0], batch.ehr[0])
    assert not series[1].any()
    assert torch.equal(series[2, :2], batch.ehr[2, :2])
    assert not series[2, 2:].any()


def test_labs_get_the_models_columns_and_hold_nothing_unobserved(make_batch):
    batch = replace(
        make_batch(rows=3),
        labs=torch.tensor([[0.1, torch.nan], [0.2, 0.3], [0.4, 0.5]]),
        labs_observed=torch.tensor([[True, False], [True, True], [True, True]]),
    )
    batch.present["labs"] = torch.tensor([True, False, True])
    values, observed = present_labs(batch, 3)
    assert observed.tolist() == [[True, False, False], [False] * 3, [True, True, False]]
    assert torch.equal(values, torch.tensor([[0.1, 0, 0], [0, 0, 0], [0.4, 0.5, 0]]))
    with pytest.raises(InputError, match=r"has 2 columns, but the model reads 1: set model\.items"):
        present_labs(batch, 1)


def test_a_batch_without_a_lab_matrix_has_no_lab_observed(make_batch):
    values, observed = present_labs(replace(make_batch(rows=3), labs=torch.empty(0, 0)), 4)
    assert values.shape == observed.shape == (3, 4)
    assert not values.any()
    assert not observed.any()


def test_keep_present_zeroes_absent_rows_and_their_gradients():
    encoded = torch.tensor([[1.0, 2.0], [torch.nan, 4.0]], requires_grad=True)
    kept = keep_present(encoded, torch.tensor([True, False]))
    assert kept.tolist() == [[1.0, 2.0], [0.0, 0.0]]
    kept.sum().backward()
    assert encoded.grad.tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_valid_steps_are_true_within_lengths():
    mask = valid_steps(torch.tensor([1, 3]), 3)
    assert mask.tolist() == [[True, False, False], [True, True, True]]
