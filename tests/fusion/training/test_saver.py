"""Saving beside training: nothing moves, nothing is lost, and every worker hears of a fault."""

from __future__ import annotations

import errno
import json
import re
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.errors import InputError
from fusion.hashed import digest
from fusion.training import checkpoint, flight
from fusion.training.agreed import AgreedError
from fusion.training.flight import SaveError
from fusion.training.loop import fit

LONG_S = 120.0


def assert_equal(ours, theirs):
    """Two mappings of tensors, to the bit."""
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def tensors(folder):
    """Every tensor below a folder."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{path.stem}/{key}": value for path in files for key, value in load_file(path).items()}


def steps_saved(session):
    """(update at which the line was written, update that was saved)."""
    return [
        (line["updates"], line["values"]["updates"])
        for line in session.log.lines
        if line["values"].get("event") == "checkpoint"
    ]


@pytest.fixture
def make(harness, tmp_path):
    """A session of one worker; three steps an epoch, two epochs."""

    def made(name="run", **block):
        block = {"strategy": "single", "every_steps": 2, "options": {"dropout": 0.3}, **block}
        return harness.session(harness.Job(folder=str(tmp_path / name), out="", **block))

    return made


def test_training_goes_on_while_the_checkpoint_of_its_step_is_written(make):
    """The thread may not write before a later step is done: what it writes is of its own step."""
    contents = {}
    for name, asynchronous in (("in-place", False), ("beside", True)):
        session, later, kept = make(name, asynchronous=asynchronous), threading.Event(), {}

        def written(path, later=later, kept=kept):
            assert threading.current_thread() is not threading.main_thread()
            assert later.wait(LONG_S)
            if path.name == "COMPLETE":
                kept[path.parent.name] = tensors(path.parent)

        def beat(stage, progress, later=later):
            if progress.updates >= 3:
                later.set()

        session.saver.on_written, session.beat = written, beat
        if not asynchronous:
            later.set()
        fit(session)
        contents[name] = (kept, steps_saved(session), session.strategy.model.state_dict())
    (kept, lines, weights), (kept_beside, lines_beside, weights_beside) = contents.values()
    assert lines == [(2, 2), (3, 3), (4, 4), (6, 6)], "said when it is complete: at once"
    assert [step for _, step in lines_beside] == [2, 3, 4, 6]
    assert lines_beside[0] == (3, 2), "said when it is complete: later"
    assert kept.keys() == kept_beside.keys()
    for step in kept:
        assert_equal(kept_beside[step], kept[step])
    assert_equal(weights_beside, weights)


def test_a_fault_of_the_thread_ends_training_at_the_next_step(make):
    undisturbed = make("undisturbed")
    fit(undisturbed)
    session = make()

    def written(path):
        if path.parent.parent.name == "step-00000004":
            raise RuntimeError("the bucket is gone")

    session.saver.on_written = written
    with pytest.raises(SaveError, match=r"step-00000004 .* by worker 0: the bucket is gone"):
        fit(session)
    assert 4 <= session.progress.updates <= 6
    found = checkpoint.newest_complete(session.saver.checkpoints)
    assert found.path.name == "step-00000003"
    assert list(found.skipped) == ["step-00000004"]
    again = make()
    assert fit(again) == "epochs"
    assert again.log.lines[0]["values"]["updates"] == 3
    assert_equal(again.strategy.model.state_dict(), undisturbed.strategy.model.state_dict())


def test_a_fault_of_the_last_checkpoint_is_not_lost(make):
    session = make(every_steps=None)

    def written(path):
        if path.name == "COMPLETE" and path.parent.name == "step-00000006":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    session.saver.on_written = written
    with pytest.raises(SaveError, match="No space left on device") as caught:
        fit(session)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename.endswith("COMPLETE")


def test_another_error_leaves_no_thread_waiting(make):
    session = make()
    session.after_validation = lambda values: 1 / 0
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        fit(session)
    for thread in threading.enumerate():
        if thread.name.startswith("saver"):
            thread.join(LONG_S)
    assert threading.active_count() <= before


def test_a_list_of_an_earlier_attempt_is_not_taken(tmp_path):
    path, found = tmp_path / "rank-0001" / flight.LIST, []
    path.parent.mkdir()
    path.write_text(json.dumps({"attempt": "before", "files": {"old": "0"}}))
    now = flight.Attempt(tmp_path, "now")
    thread = threading.Thread(target=lambda: found.append(flight.listed(path, now)))
    thread.start()
    thread.join(4 * flight.POLL_S)
    assert found == []
    path.write_text('{"attempt": "no')
    thread.join(4 * flight.POLL_S)
    assert found == []
    path.write_text(json.dumps({"attempt": "now", "files": {"new": "1"}}))
    thread.join(LONG_S)
    assert found == [{"new": "1"}]
    other = flight.Attempt(tmp_path, "other")
    other.abandoned.set()
    with pytest.raises(RuntimeError, match="waited for no more"):
        flight.listed(path, other)


def test_best_switches_whole_or_not_at_all(make):
    session = make(every_steps=None, train={"restore": "last", "epochs": 1})
    fit(session)
    best = session.folder / "best"
    before, _ = checkpoint.read_weights(best)
    removed = []
    session.saver.on_removed = removed.append
    with torch.no_grad():
        session.strategy.model.head.bias.add_(1)

    def fail(path):
        raise RuntimeError("no")

    session.saver.on_written = fail
    with pytest.raises(SaveError, match="best/ could not be written"), session.saver:
        session.saver.write_best(session.progress, {}, "last")
    assert_equal(checkpoint.read_weights(best)[0], before)
    session.saver.on_written = lambda path: None
    with session.saver:
        session.saver.write_best(session.progress, {}, "last")
    after, meta = checkpoint.read_weights(best)
    assert torch.equal(after["head.bias"], before["head.bias"] + 1)
    (part,) = meta["files"]
    assert [path.name for path in best.iterdir() if path.is_dir()] == [part.split("/")[0]]
    assert len(removed) == 2, "the old parts, and those that were not switched to"
    assert all(path.parent == best for path in removed)


def test_a_reader_of_best_meets_the_old_weights_or_the_new(tmp_path):
    model = torch.nn.Linear(64, 64)
    ended, seen, faults = threading.Event(), set(), []

    def read():
        while not ended.is_set():
            try:
                weights, _ = checkpoint.read_weights(tmp_path)
            except InputError as error:
                faults.append(str(error))
            else:
                values = {float(value) for each in weights.values() for value in each.unique()}
                seen.add(tuple(values))

    torch.nn.init.constant_(model.weight, 0)
    torch.nn.init.constant_(model.bias, 0)
    checkpoint.write_weights(tmp_path, model, {})
    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 40):
        torch.nn.init.constant_(model.weight, number)
        torch.nn.init.constant_(model.bias, number)
        checkpoint.write_weights(tmp_path, model, {})
    ended.set()
    reader.join(LONG_S)
    assert faults == []
    assert all(len(values) == 1 for values in seen)


@pytest.mark.parametrize(
    ("meta", "message"),
    [("[", "not valid JSON"), ('{"format": 2}', "format 2"), ('{"format": 3}', "`files`")],
)
def test_a_best_of_another_kind_is_refused(tmp_path, meta, message):
    (tmp_path / "meta.json").write_text(meta)
    with pytest.raises(InputError, match=message):
        checkpoint.read_weights(tmp_path)


@pytest.fixture
def base(harness, tmp_path):
    """A weights file, and a function for sessions whose two encoders stay as it has them."""
    torch.manual_seed(5)
    source = tmp_path / "base.safetensors"
    save_file(harness.Toy().state_dict(), source)

    def made(name="frozen", **block):
        block = {
            "init_from": {"ehr": str(source), "cxr": str(source)},
            "optim": {"group_lr": {"ehr": 0, "cxr.weight": 0}},
            "every_steps": 2,
            "strategy": "single",
            **block,
        }
        return harness.session(harness.Job(folder=str(tmp_path / name), out="", **block))

    return source, made


def test_what_stays_as_its_source_has_it_is_named_not_written(base):
    source, made = base
    session = made()
    fit(session)
    found = checkpoint.newest_complete(session.saver.checkpoints)
    kept = load_file(found.path / "rank-0000" / "weights.safetensors")
    state = session.strategy.model.state_dict()
    frozen = {"ehr.weight", "ehr.bias", "cxr.weight"}
    assert set(state) - set(kept) == frozen, "cxr.bias is trained"
    given = load_file(source)
    names = {prefix: sorted(each.names) for prefix, each in found.meta.base.items()}
    assert names == {"ehr": ["ehr.bias", "ehr.weight"], "cxr": ["cxr.weight"]}
    of_cxr = found.meta.base["cxr"]
    assert of_cxr.source == str(source)
    assert of_cxr.sha256 == digest({"cxr.weight": given["cxr.weight"]})
    best, _ = checkpoint.read_weights(session.folder / "best")
    assert set(best) == set(state), "best/ needs no source"
    for name in frozen:
        assert torch.equal(best[name], given[name])


def test_a_run_on_a_frozen_base_goes_on_from_its_source(base):
    _, made = base
    whole, halted = made("whole"), made("halted", stop_at=4)
    fit(whole)
    assert fit(halted) == "interrupted"
    again = made("halted")
    fit(again)
    assert_equal(again.strategy.model.state_dict(), whole.strategy.model.state_dict())
    assert again.saver.base == whole.saver.base


def test_another_base_is_refused_by_both_hashes(base):
    source, made = base
    session = made()
    fit(session)
    weights = load_file(source)
    save_file({**weights, "head.bias": weights["head.bias"] + 1}, source)
    assert fit(made()) == "epochs", "what is not frozen may change"
    before = session.saver.base["ehr"].sha256
    weights["ehr.bias"][0] += 1
    save_file(weights, source)
    now = digest({name: weights[name] for name in ("ehr.weight", "ehr.bias")})
    with pytest.raises(AgreedError) as caught:
        fit(made())
    said = str(caught.value)
    assert said.startswith(f"init_from.ehr: {source} holds other weights")
    assert f"sha256 {now}" in said
    assert before in said
    del weights["ehr.bias"]
    save_file(weights, source)
    with pytest.raises(AgreedError, match=r"init_from\.ehr: .* has no 'ehr\.bias'"):
        fit(made())
    source.unlink()
    with pytest.raises(AgreedError, match="does not exist"):
        fit(made())
    with pytest.raises(AgreedError, match=r"init_from\.cxr: not set, but the checkpoint leaves 1"):
        fit(made(init_from={}))


def test_the_digest_is_of_names_types_shapes_and_values():
    one = {"a": torch.zeros(2, 3), "b": torch.tensor(1.0)}
    assert digest(one) == digest(dict(reversed(one.items())))
    for other in (
        {"a": torch.zeros(3, 2), "b": torch.tensor(1.0)},
        {"a": torch.zeros(2, 3).bfloat16(), "b": torch.tensor(1.0)},
        {"a": torch.zeros(2, 3), "c": torch.tensor(1.0)},
        {"a": torch.zeros(2, 3), "b": torch.tensor(1.0).nextafter(torch.tensor(2.0))},
    ):
        assert digest(other) != digest(one)
    assert digest({"a": torch.zeros(2, 3).t()}) == digest({"a": torch.zeros(3, 2)})


@pytest.fixture(scope="module")
def outcomes(harness, train_jobs, tmp_path_factory):
    """Two workers, of which the second writes slowly, or may let no file grow."""
    root = tmp_path_factory.mktemp("saver")

    def job(name, folder=None, **block):
        block = {"options": {"dropout": 0.3}, "world": 2, "every_steps": 2, **block}
        out, folder = str(root / name / "out"), str(root / (folder or name))
        return harness.Job(folder=folder, out=out, **block)

    jobs = {
        "undisturbed": job("undisturbed", every_steps=None),
        "full": job("full", full_disk_at=4),
        "mended": job("mended", "full"),
        "killed": job("killed", write_delay=1.0, kill_rank=0, kill_at=4),
        "continued": job("continued", "killed"),
    }
    ran = dict(zip(jobs, train_jobs(root, list(jobs.values())), strict=True))
    ran["root"] = root
    return ran


def test_a_disk_that_is_full_for_one_worker_ends_all_alike(outcomes):
    outcome = outcomes["full"]
    assert outcome.codes == [0, 0], outcome.stderr[-2000:]
    first, second = (result["error"] for result in outcome.results)
    assert first == second
    assert re.search(r"could not be written by worker 1: .*(Errno|os error) 27", first), first
    assert outcomes["mended"].codes == [0, 0], outcomes["mended"].stderr[-2000:]
    start = outcomes["mended"].results[0]["lines"][0]["values"]
    assert start["updates"] in (3, 4), "the limit may have met the checkpoint of step 4"
    for ours, theirs in zip(
        outcomes["mended"].weights, outcomes["undisturbed"].weights, strict=True
    ):
        assert_equal(ours, theirs)


def test_a_kill_while_a_part_is_written_costs_that_checkpoint_alone(outcomes):
    assert outcomes["killed"].codes[0] == -9
    continued = outcomes["continued"]
    assert continued.codes == [0, 0], continued.stderr[-2000:]
    start = continued.results[0]["lines"][0]["values"]
    assert start["updates"] == 3
    assert start["skipped"] == {"step-00000004": "no COMPLETE: it was not finished"}
    for ours, theirs in zip(continued.weights, outcomes["undisturbed"].weights, strict=True):
        assert_equal(ours, theirs)


def test_parts_of_best_lie_with_their_owners(outcomes):
    folder = outcomes["root"] / "undisturbed" / "best"
    meta = json.loads((folder / "meta.json").read_text())
    assert sorted(name.split("/")[1] for name in meta["files"]) == [
        "rank-0000.safetensors",
        "rank-0001.safetensors",
    ]
    held = [set(load_file(folder / name)) for name in meta["files"]]
    assert all(held)
    assert not held[0] & held[1]
    assert held[0] | held[1] == set(outcomes["undisturbed"].weights[0])
