import pytest
import torch
import torchvision
from safetensors.torch import save_file

from data.errors import InputError
from fusion.encoders.image import ResNet, TwinResNet, build_resnet, stage_channels


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_is_torchvisions_trunk(depth):
    torch.manual_seed(0)
    reference = getattr(torchvision.models, f"resnet{depth}")()
    network = ResNet(depth=depth)
    state = {k: v for k, v in reference.state_dict().items() if not k.startswith("fc.")}
    network.load_state_dict(state)
    reference.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            network.eval()(images), reference.eval()(images), atol=1e-4, rtol=1e-4
        )


def test_initialisation_is_torchvisions():
    torch.manual_seed(0)
    network = ResNet(depth=18)
    weight = network.layer2[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert network.bn1.weight.eq(1).all()
    assert not network.bn1.bias.any()


def test_sizes_at_the_papers_numbers():
    assert round(size(ResNet(depth=34)) / 1e6, 2) == 21.28
    assert round(size(ResNet(depth=50)) / 1e6, 1) == 23.5


@pytest.mark.parametrize(("depth", "width"), [(10, 4), (34, 8), (50, 4)])
def test_stages_and_channels_follow_the_width(depth, width):
    whole = ResNet(depth=depth, base_width=width).eval()
    images = torch.randn(2, 3, 32, 32)
    maps = whole.stem(images)
    for stage in range(1, 5):
        maps = whole.run_stages(maps, stage, stage)
        assert maps.shape[1] == stage_channels(depth, width, stage)
        part = ResNet(depth=depth, base_width=width, stages=stage).eval()
        missing, unexpected = part.load_state_dict(whole.state_dict(), strict=False)
        assert missing == []
        assert all(name.startswith("layer") for name in unexpected)
        assert part.channels == maps.shape[1]
        torch.testing.assert_close(part(images), maps.mean((2, 3)))


def test_twin_branches_are_whole_networks_of_their_own():
    torch.manual_seed(0)
    twin = TwinResNet(depth=10, base_width=4, width=6)
    output = twin(torch.randn(3, 3, 32, 32))
    assert output.shape == (3, 2, 6)
    output[:, 0].sum().backward()
    assert twin.shared.conv1.weight.grad.any()
    assert not twin.distinct.conv1.weight.grad.any()


def test_twin_with_one_stem_shares_the_first_convolution_alone():
    torch.manual_seed(0)
    apart = TwinResNet(depth=10, base_width=4, width=6)
    twin = TwinResNet(depth=10, base_width=4, width=6, stem="shared")
    assert size(apart) - size(twin) == 3 * 4 * 49 + 2 * 4
    images = torch.randn(3, 3, 32, 32)
    output = twin(images)
    assert twin.shared.bn1.num_batches_tracked.item() == 1
    output[:, 1].sum().backward()
    assert twin.shared.conv1.weight.grad.any()
    assert not twin.shared.layer1[0].conv1.weight.grad.any()
    twin.eval()
    stem = twin.shared.stem(images)
    expected = twin.distinct_projection(twin.distinct.run_stages(stem, 1, 4).mean((2, 3)))
    torch.testing.assert_close(twin(images)[:, 1], expected)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_image_weights_come_from_the_file_given(suffix, tmp_path):
    torch.manual_seed(0)
    source = torchvision.models.resnet18()
    path = tmp_path / f"resnet18{suffix}"
    state = source.state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    for stages in (3, 4):
        network = build_resnet(18, 64, path, stages=stages)
        for name, value in network.state_dict().items():
            assert torch.equal(value, state[name])


def test_old_files_without_batch_counts_are_read(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    path = tmp_path / "old.pth"
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    assert torch.equal(build_resnet(18, 64, path).conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize(
    ("depth", "width", "expected"),
    [
        (34, 64, "missing layer1.2.conv1.weight"),
        (10, 64, "unexpected layer1.1.conv1.weight"),
        (18, 32, r"conv1.weight \(64, 3, 7, 7\) instead of \(32, 3, 7, 7\)"),
    ],
)
def test_weights_of_another_network_are_refused(depth, width, expected, tmp_path):
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    with pytest.raises(InputError, match=expected):
        build_resnet(depth, width, path)


def test_a_missing_file_of_weights_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent.pth: no such file of image weights"):
        build_resnet(18, 64, tmp_path / "absent.pth")
