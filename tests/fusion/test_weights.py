"""Released MedFuse checkpoints, from a literal re-implementation of the authors' architecture."""

import pickle

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from data.errors import InputError
from data.tasks import task_spec
from fusion import registry
from fusion.weights import import_medfuse, read_state


class ReleasedSeries(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer0 = nn.LSTM(76, 256, batch_first=True)
        self.layer1 = nn.LSTM(256, 256, batch_first=True)
        self.dense_layer = nn.Linear(256, classes)

    def forward(self, series):
        states, _ = self.layer0(series)
        _, (hidden, _) = self.layer1(states)
        return hidden[-1]


class ReleasedImage(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision_backbone = torchvision.models.resnet34()
        self.vision_backbone.fc = nn.Identity()
        self.classifier = nn.Sequential(nn.Linear(512, 14))

    def forward(self, images):
        return self.vision_backbone(images)


class ReleasedFusion(nn.Module):
    """One patient at a time, in the layout of the released state dict."""

    def __init__(self, classes):
        super().__init__()
        self.ehr_model = ReleasedSeries(classes)
        self.cxr_model = ReleasedImage()
        self.projection = nn.Linear(512, 256)
        self.lstm_fusion_layer = nn.LSTM(256, 512, batch_first=True)
        self.lstm_fused_cls = nn.Sequential(nn.Linear(512, classes), nn.Sigmoid())
        self.fused_cls = nn.Sequential(nn.Linear(512, classes), nn.Sigmoid())

    def forward(self, series, image=None):
        tokens = [self.ehr_model(series[None])]
        if image is not None:
            tokens.append(self.projection(self.cxr_model(image[None])))
        _, (hidden, _) = self.lstm_fusion_layer(torch.stack(tokens, 1))
        return self.lstm_fused_cls(hidden[-1])[0]


@pytest.fixture(scope="module")
def released():
    torch.manual_seed(0)
    model = ReleasedFusion(25)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.05)
            module.running_var.uniform_(0.8, 1.2)
    return model.eval()


@pytest.fixture
def checkpoint(released, tmp_path):
    path = tmp_path / "best_checkpoint.pth.tar"
    content = {
        "epoch": 12,
        "state_dict": released.state_dict(),
        "best_auroc": np.float64(0.77),
        "epochs_stats": {"auroc": [np.float32(0.7), np.float64(0.75)], "n": np.int64(3)},
    }
    torch.save(content, path)
    return path


def test_imported_weights_predict_what_the_released_model_predicts(
    released, checkpoint, make_batch
):
    model_class = registry.get("medfuse")
    model = model_class(model_class.Config(name="medfuse"), task_spec("phenotyping")).eval()
    model.load_state_dict(import_medfuse(checkpoint))
    batch = make_batch(
        rows=3, image_size=64, classes=25, present_cxr=[True, False, True], lengths=[6, 4, 1]
    )
    images = dict(zip(batch.cxr_index.tolist(), batch.cxr, strict=True))
    with torch.no_grad():
        probabilities = torch.sigmoid(model(batch).logits)
        for row, length in enumerate(batch.lengths.tolist()):
            expected = released(batch.ehr[row, :length], images.get(row))
            torch.testing.assert_close(probabilities[row], expected, atol=1e-5, rtol=1e-5)


def test_scalars_pickled_by_numpy_1_are_read(checkpoint, tmp_path):
    """The released files name numpy.core, which numpy 2 writes as numpy._core."""
    raw = checkpoint.read_bytes()
    assert b"numpy._core.multiarray" in raw
    old = tmp_path / "old.pth.tar"
    torch.save(read_state(checkpoint) | {}, old)
    content = {
        "best": np.float64(0.5),
        "state_dict": {"weight": torch.ones(2)},
    }
    torch.save(content, old, pickle_module=NumpyOnePickle, _use_new_zipfile_serialization=False)
    assert b"numpy.core.multiarray" in old.read_bytes()
    assert torch.equal(read_state(old)["weight"], torch.ones(2))


class NumpyOnePickle:
    """pickle, but with numpy's scalar under the module name it had before numpy 2."""

    class Pickler(pickle._Pickler):
        def save_global(self, obj, name=None):
            if obj is np._core.multiarray.scalar:
                self.write(pickle.GLOBAL + b"numpy.core.multiarray\nscalar\n")
                self.memoize(obj)
            else:
                super().save_global(obj, name)

        dispatch = {**pickle._Pickler.dispatch}  # noqa: RUF012
        dispatch[type(np._core.multiarray.scalar)] = save_global

    @staticmethod
    def dump(value, file, protocol):
        NumpyOnePickle.Pickler(file, protocol).dump(value)


def test_a_pointer_of_git_lfs_is_called_that(tmp_path):
    path = tmp_path / "checkpoint.pth.tar"
    path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 285111\n"
    )
    with pytest.raises(InputError, match=r"a Git LFS pointer of .* bytes, not weights"):
        import_medfuse(path)


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "evil.pth.tar"
    torch.save({"state_dict": Evil()}, path)
    with pytest.raises(InputError, match="cannot be read as plain weights"):
        import_medfuse(path)
    assert not (tmp_path / "ran").exists()


def rewritten(checkpoint, change):
    content = torch.load(checkpoint, weights_only=False)
    change(content["state_dict"])
    torch.save(content, checkpoint)
    return checkpoint


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state.pop("projection.bias"), "missing projection.bias"),
        (
            lambda state: state.update({"mmtm0.fc.weight": torch.ones(1)}),
            "unexpected mmtm0.fc.weight",
        ),
        (
            lambda state: state.update({"ehr_model.layer0.weight_ih_l0": torch.ones(1024, 48)}),
            r"weight_ih_l0 \(1024, 48\) instead of \(1024, 76\)",
        ),
    ],
)
def test_other_names_and_shapes_are_listed(checkpoint, change, expected):
    with pytest.raises(InputError, match=expected):
        import_medfuse(rewritten(checkpoint, change))


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 torn"])
def test_files_that_hold_no_weights_are_refused(content, tmp_path):
    path = tmp_path / "torn.pth.tar"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"torn.pth.tar: cannot be read as plain weights"):
        import_medfuse(path)


def test_a_torn_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "torn.safetensors"
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(InputError, match="cannot be read as plain weights"):
        read_state(path)


def test_a_file_without_named_tensors_is_refused(tmp_path):
    path = tmp_path / "list.pth"
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="holds no state dict"):
        read_state(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(InputError, match="epoch are no tensors"):
        read_state(path)
    with pytest.raises(InputError, match="no such weights file"):
        read_state(tmp_path / "absent.pth")
