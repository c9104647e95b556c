"""A checkpoint is taken whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from data.errors import InputError
from data.files import sha256_file
from fusion.training import checkpoint
from fusion.training.agreed import AgreedError
from fusion.training.loop import fit
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


def damaged_at(spare, name, content):
    """What is found while a file of the newer checkpoint has other content."""
    folder, contents = spare
    path = folder / "step-00000006" / name
    path.write_bytes(content)
    try:
        return checkpoint.newest_complete(folder)
    finally:
        path.write_bytes(contents[name])


@hypothesis_settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 8))
def test_one_cut_short_or_altered_anywhere_is_passed_over(spare, name, where, bit):
    content = spare[1][name]
    at = int(where * len(content))
    rest = bytes([content[at] ^ (1 << bit)]) + content[at + 1 :] if bit < 8 else b""
    found = damaged_at(spare, name, content[:at] + rest)
    assert found.path == spare[0] / "step-00000003"
    assert list(found.skipped) == ["step-00000006"]
    assert found.skipped["step-00000006"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_one_cut_short_or_altered_at_any_byte_does_not_verify(spare, name):
    """Every length of every file; every byte of the small ones changed, of others every 13th."""
    folder, contents = spare
    newest, content = folder / "step-00000006", contents[name]
    path = newest / name
    try:
        for at in range(0, len(content), 1 if len(content) < 4096 else 13):
            path.write_bytes(content[:at] + bytes([content[at] ^ 0x20]) + content[at + 1 :])
            assert checkpoint.verify(newest), f"{name} altered at {at}"
        for at in reversed(range(len(content))):
            os.truncate(path, at)
            assert checkpoint.verify(newest), f"{name} cut at {at}"
    finally:
        path.write_bytes(content)
    assert checkpoint.verify(newest) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda meta: "[1, 2", r"not valid JSON"),
        (lambda meta: "[]", r"the whole: Input should be"),
        (lambda meta: json.dumps({**meta, "format": "3"}), r"format: .*valid integer"),
        (lambda meta: json.dumps({**meta, "files": ["a"]}), r"files: Input should be"),
        (lambda meta: json.dumps({**meta, "files": {"a": 1}}), r"files\.a: .*valid string"),
        (lambda meta: json.dumps({**meta, "files": {"../a": ""}}), r"not below the checkpoint"),
        (lambda meta: json.dumps({**meta, "files": {"/etc/passwd": ""}}), r"not below"),
        (lambda meta: json.dumps({**meta, "world": 0}), r"world: .*greater than 0"),
        (lambda meta: json.dumps({**meta, "schedule": None}), r"schedule: Input should be"),
        (lambda meta: json.dumps({**meta, "progress": {"epoch": "x"}}), r"progress\.epoch: "),
        (lambda meta: json.dumps({**meta, "base": {"": {}}}), r"base\.\.source: Field required"),
        (lambda meta: json.dumps({k: v for k, v in meta.items() if k != "files"}), r"files: Field"),
    ],
)
def test_a_meta_of_wrong_content_is_passed_over_with_a_reason(spare, change, reason):
    """Also where COMPLETE agrees with it."""
    folder, contents = spare
    newest = folder / "step-00000006"
    (newest / "meta.json").write_text(change(json.loads(contents["meta.json"])))
    (newest / "COMPLETE").write_text(sha256_file(newest / "meta.json") + "\n")
    try:
        found = checkpoint.newest_complete(folder)
    finally:
        for name in ("meta.json", "COMPLETE"):
            (newest / name).write_bytes(contents[name])
    assert found.path == folder / "step-00000003"
    assert re.search(reason, found.skipped["step-00000006"]), found.skipped


def test_a_whole_one_of_another_format_is_not_passed_over(spare):
    """An older one, or a start from nothing, would throw its steps away."""
    folder, contents = spare
    newest = folder / "step-00000006"
    meta = {**json.loads(contents["meta.json"]), "format": 2}
    (newest / "meta.json").write_text(json.dumps(meta))
    (newest / "COMPLETE").write_text(sha256_file(newest / "meta.json") + "\n")
    try:
        with pytest.raises(InputError, match="format 2, but this version of the package reads 3"):
            checkpoint.newest_complete(folder)
    finally:
        for name in ("meta.json", "COMPLETE"):
            (newest / name).write_bytes(contents[name])


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


def test_an_altered_one_is_not_among_those_kept(harness, tmp_path):
    """Two are kept: the one just written, and the newest other one that verifies."""
    job = harness.Job(folder=str(tmp_path), out="", strategy="single")
    session = harness.session(job)
    fit(session)
    folder = tmp_path / "checkpoints"
    with (folder / "step-00000006" / "rank-0000" / "moments.safetensors").open("r+b") as handle:
        handle.seek(100)
        handle.write(b"\xff")
    with session.saver:
        session.saver.save(Progress(updates=7), session.schedule, {})
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000007"]
    assert all(checkpoint.verify(path) is None for path in folder.iterdir())


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


def test_a_checkpoint_of_a_run_on_other_shards_is_refused(harness, tmp_path):
    job = harness.Job(folder=str(tmp_path), out="", strategy="single")
    first, other = harness.session(job), harness.session(job)
    first.document = {"lineage": {"manifest": "a" * 64}}
    fit(first)
    other.document = {"lineage": {"manifest": "b" * 64}}
    with pytest.raises(AgreedError, match=r"other shards \(manifest aaaaaaaaaaaa, but now bbb"):
        fit(other)


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


def test_meta_says_where_the_run_stands_and_what_it_was_made_from(trained):
    session, folder = trained
    path = folder / "checkpoints" / "step-00000006" / "meta.json"
    meta = checkpoint.Meta.model_validate_json(path.read_bytes())
    assert meta.progress == session.progress
    assert meta.progress.validations == 2, "early stopping goes on counting"
    assert meta.model_extra["config"] == {"seed": 3}
    assert (meta.world, meta.schedule, meta.base) == (1, {}, {})


def test_meta_names_every_file(trained):
    folder = trained[1] / "checkpoints" / "step-00000006"
    meta = json.loads((folder / "meta.json").read_text())
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {*meta["files"], "meta.json", "COMPLETE"} == written


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
