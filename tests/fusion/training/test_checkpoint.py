"""A checkpoint is taken whole or not at all."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from data.errors import InputError
from fusion.training import checkpoint
from fusion.training.loop import AgreedError, fit
from fusion.training.progress import Progress
from fusion.training.strategy import owner

FILES = [
    "rank-0000/weights.safetensors",
    "rank-0000/moments.safetensors",
    "rank-0000/worker.safetensors",
    "meta.json",
    "COMPLETE",
]


@pytest.fixture(scope="module")
def trained(harness, tmp_path_factory):
    """A session at the end of its two epochs, and its folder."""
    folder = tmp_path_factory.mktemp("trained")
    session = harness.session(harness.Job(folder=str(folder), out="", strategy="single"))
    fit(session)
    return session, folder


@pytest.fixture(scope="module")
def spare(trained, tmp_path_factory):
    """Two checkpoints of which a test may damage the newer; its files' bytes, to mend it."""
    folder = tmp_path_factory.mktemp("spare") / "checkpoints"
    shutil.copytree(trained[1] / "checkpoints", folder)
    newest = folder / "step-00000006"
    return folder, {name: (newest / name).read_bytes() for name in FILES}


@hypothesis_settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), flip=st.booleans())
def test_one_cut_short_or_altered_anywhere_is_passed_over(spare, name, where, flip):
    folder, contents = spare
    content = contents[name]
    at = int(where * len(content))
    damaged = content[:at]
    if flip:
        damaged += bytes([content[at] ^ 1]) + content[at + 1 :]
    path = folder / "step-00000006" / name
    path.write_bytes(damaged)
    try:
        found = checkpoint.newest_complete(folder)
    finally:
        path.write_bytes(content)
    assert found.path == folder / "step-00000003"
    assert list(found.skipped) == ["step-00000006"]


@pytest.mark.parametrize("name", FILES)
def test_one_without_a_file_is_passed_over(spare, name):
    folder, contents = spare
    path = folder / "step-00000006" / name
    path.unlink()
    found = checkpoint.newest_complete(folder)
    path.write_bytes(contents[name])
    assert found.path == folder / "step-00000003"
    assert checkpoint.newest_complete(folder).path == folder / "step-00000006"


def test_a_run_whose_newest_checkpoint_is_torn_goes_on_from_the_one_before(harness, tmp_path):
    job = harness.Job(folder=str(tmp_path), out="", strategy="single", every_steps=2)
    session = harness.session(job)
    fit(session)
    want = {name: value.clone() for name, value in session.strategy.model.state_dict().items()}
    torn = tmp_path / "checkpoints" / "step-00000006" / "rank-0000" / "weights.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    again = harness.session(job)
    fit(again)
    start = again.log.lines[0]["values"]
    assert start["updates"] == 4
    assert start["skipped"] == {"step-00000006": "rank-0000/weights.safetensors was altered"}
    got = again.strategy.model.state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert checkpoint.verify(torn.parents[1]) is None, "written anew"


def test_old_and_torn_ones_are_removed(trained):
    session, folder = trained
    checkpoints = folder / "checkpoints"
    (checkpoints / "step-00000005").mkdir()
    (checkpoints / "notes").mkdir()
    with session.saver:
        session.saver.save(Progress(updates=7), session.schedule, {})
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["notes", "step-00000006", "step-00000007"]


def test_nothing_is_pickled(trained):
    names = {path.suffix for path in trained[1].rglob("*") if path.is_file()}
    assert names <= {".safetensors", ".json", ""}


def test_another_models_checkpoint_is_refused_by_name(harness, tmp_path):
    fit(harness.session(harness.Job(folder=str(tmp_path), out="", strategy="single")))
    other = harness.Job(
        folder=str(tmp_path), out="", strategy="single", options={"batch_norm": True}
    )
    with pytest.raises(InputError, match=r"lacks 'norm"):
        fit(harness.session(other))


def test_best_weights_come_back_or_are_refused(trained, tmp_path):
    session, folder = trained
    tensors, meta = checkpoint.read_weights(folder / "best")
    assert meta["selected"] == "best"
    assert meta["config"] == {"seed": 3}
    assert set(tensors) == set(session.strategy.model.state_dict())
    shutil.copytree(folder / "best", tmp_path / "best")
    (part,) = (tmp_path / "best").glob("parts-*/rank-0000.safetensors")
    with part.open("ab") as handle:
        handle.write(b"x")
    with pytest.raises(InputError, match="not the file"):
        checkpoint.read_weights(tmp_path / "best")
    with pytest.raises(InputError, match="train the run first"):
        checkpoint.read_weights(tmp_path)


def test_restore_last_leaves_the_last_weights_in_best(harness, tmp_path):
    job = harness.Job(
        folder=str(tmp_path), out="", strategy="single", train={"restore": "last", "epochs": 4}
    )
    session = harness.session(job)
    fit(session)
    tensors, meta = checkpoint.read_weights(tmp_path / "best")
    assert meta["selected"] == "last"
    state = session.strategy.model.state_dict()
    assert all(torch.equal(tensors[name], state[name]) for name in state)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_owners_depend_on_the_name_alone_and_cover_all_workers(world):
    owners = [owner(f"layer.{index}.weight", world) for index in range(200)]
    assert owners == [owner(f"layer.{index}.weight", world) for index in range(200)]
    assert set(owners) == set(range(world))


def test_meta_names_every_file(trained):
    folder = trained[1] / "checkpoints" / "step-00000006"
    meta = json.loads((folder / "meta.json").read_text())
    written = {
        str(path.relative_to(folder)) for path in folder.rglob("*.safetensors") if path.is_file()
    }
    assert set(meta["files"]) == written


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_the_first_step(
    harness, tmp_path, monkeypatch
):
    """Three checkpoints of weights and two moments, and the best weights twice, in fp32."""
    session = harness.session(harness.Job(folder=str(tmp_path), out="", strategy="single"))
    values = sum(value.numel() for value in session.strategy.model.state_dict().values())
    needed = 44 * values
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed, 1, needed - 1))
    with pytest.raises(AgreedError, match=r"GB free, but 2 checkpoints.*num_to_keep"):
        fit(session)
    assert session.progress.updates == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed, 0, needed))
    assert fit(session) == "epochs"
