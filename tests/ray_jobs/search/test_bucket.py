"""A search whose runs are in a bucket goes on anywhere: nothing finished is run again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from optuna.trial import TrialState

from data.errors import InputError
from fusion.training import metrics_log
from ray_jobs import lease, storage, tune
from ray_jobs.search import bucket
from ray_jobs.search.study import JOURNAL, Study

SPACE = {"optim.lr": {"log": [1e-3, 1e-1]}, "model.dropout": {"uniform": [0.0, 0.5]}}


class MachineDiedError(BaseException):
    """Nothing catches it."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "DEAD_AFTER_S", 0.2)
    monkeypatch.setattr(tune.report, "write", lambda study, run, folder: folder.report)


@pytest.fixture
def on(make_plan, tmp_path):
    """`on(machine, storage_path)`: the same command there."""

    def make(machine, path, **search):
        search = {"space": SPACE, "trials": 3, **search}
        blocks = {
            "storage_path": path,
            "checkpoint": {"asynchronous": False},
            "train": {"epochs": 2, "batch_size": 12},
        }
        return make_plan(search, runs_dir=tmp_path / machine / "runs", **blocks)

    return make


def study_of(plan):
    return Study(plan.search, plan.run, plan.folder.path)


def outcomes(plan):
    return [(trial.params, trial.values) for trial in study_of(plan).trials]


def starts(plan):
    """The steps at which each trial's attempts began."""
    return {
        folder.name: [
            line["step"]
            for line in metrics_log.follow_files(folder / "metrics")
            if line["values"].get("event") == "start"
        ]
        for folder in plan.folder.runs()
    }


def lost(plan, serial, monkeypatch, number, epoch):
    """Run a search on a machine that dies: it gives back no lease, and puts nothing more."""
    dead = []
    put = storage.Bucket.put

    def until_death(self, source, name):
        if not dead:
            put(self, source, name)

    def told(job, kind, value):
        if job.number == number and kind == "epoch" and value["epoch"] == epoch:
            dead.append(True)
            raise MachineDiedError

    with monkeypatch.context() as scope:
        scope.setattr(lease, "_release", lambda store, folder, mine: None)
        scope.setattr(storage.Bucket, "put", until_death)
        with pytest.raises(MachineDiedError):
            tune.run(plan, executor=serial(plan, told))


def test_another_machine_knows_every_finished_trial_and_runs_none_twice(
    on, serial, s3, tmp_path, monkeypatch
):
    whole = on("undisturbed", None)
    tune.run(whole, executor=serial(whole))
    path = s3("search-lives")
    first = on("first", path)
    lost(first, serial, monkeypatch, 1, 2)
    store = storage.open_store(storage.below(path, "search"))
    assert JOURNAL in store.names()
    assert "trial-0000/outcome.json" in store.names()

    second = on("second", path)
    said = []
    tune.run(second, say=said.append, executor=serial(second))
    assert said[0] == "search: 2 of 3 trial(s) to go"
    assert outcomes(second) == outcomes(whole)
    found = starts(second)
    assert found["trial-0000"] == [0], "fetched to look at, not run"
    # The checkpoint of its first epoch was in the bucket.
    assert found["trial-0001"] == [0, 3]
    assert found["trial-0002"] == [0]
    assert not (second.folder.path / "trial-0000" / "checkpoints").exists()
    assert second.folder.trial("trial-0000").best.is_dir()

    third = on("third", path)
    tune.run(third, say=said.append, executor=serial(third))
    assert "search: 0 of 3 trial(s) to go" in said
    assert starts(third) == found
    assert outcomes(third) == outcomes(whole)

    # The first machine comes back: what it began and could not say is set aside.
    tune.run(first, say=said.append, executor=serial(first))
    assert outcomes(first) == outcomes(whole)
    assert (first.folder.path / bucket.ASIDE).is_file()
    assert starts(first)["trial-0000"] == [0]


def test_a_snapshot_follows_every_beginning_and_end(on, serial, s3, tmp_path):
    path = s3("search-steps")
    plan = on("here", path, trials=2)
    store = storage.open_store(storage.below(path, "search"))
    seen = []

    def told(job, kind, value):
        if kind == "epoch" and value["epoch"] == 1:
            copy = tmp_path / f"copy-{job.number}"
            copy.mkdir()
            store.get(JOURNAL, copy / JOURNAL)
            study = Study(plan.search, plan.run, copy)
            seen.append([trial.state for trial in study.trials])
            seen.append([trial.user_attrs["values"] for trial in study.trials])

    tune.run(plan, executor=serial(plan, told))
    held = store.names()
    assert held[JOURNAL] == (plan.folder.path / JOURNAL).stat().st_size
    states, values = seen[0::2], seen[1::2]
    done, running = TrialState.COMPLETE, TrialState.RUNNING
    assert states == [[running], [done, running]]
    assert values[-1] == [trial.params for trial in study_of(plan).trials]
    assert {"search.yaml", "run.yaml"} <= held.keys()
    assert lease.NAME not in held


def test_names_and_places_that_do_not_fit_are_refused(on, serial, s3, monkeypatch):
    with pytest.raises(InputError, match="bucket 'search-missing' does not exist"):
        tune.run(on("here", s3("search-missing", make=False)))
    path = s3("search-refused")
    plan = on("here", path, trials=1)
    tune.run(plan, executor=serial(plan))
    other = on("there", path, space={"optim.lr": {"log": [1e-6, 1e-1]}})
    with pytest.raises(InputError, match="another search: space differ"):
        tune.run(other, executor=serial(other))
    of_a_run = replace(on("elsewhere", storage.below(path, "search")), name="trial-0000")
    with pytest.raises(InputError, match=r"search/trial-0000 is a run; give the search another"):
        tune.run(of_a_run, executor=serial(of_a_run))
    monkeypatch.setattr(lease, "DEAD_AFTER_S", 30.0)
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    again = on("again", path)
    with (
        bucket.kept(plan.run, plan.folder),
        pytest.raises(InputError, match="by another command"),
    ):
        tune.run(again, executor=serial(again))


def test_a_folder_as_storage_path_holds_the_search(on, serial, tmp_path):
    plan = on("here", str(tmp_path / "nfs"), trials=1)
    folder = tune.run(plan, executor=serial(plan))
    assert folder == tmp_path / "nfs" / "search"
    assert starts(plan) == {"trial-0000": [0]}
    assert not (tmp_path / "here").exists()
