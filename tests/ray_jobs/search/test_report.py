"""The report of a search, and two searches compared."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from data.errors import InputError
from ray_jobs import tune
from ray_jobs.search import figures, report
from ray_jobs.search.compare import compare
from ray_jobs.search.study import Study

SPACE = {
    "optim.lr": {"log": [1e-5, 1e-1]},
    "model.dropout": {"uniform": [0.0, 0.5]},
    "optim.schedule": {"choice": ["constant", "plateau"]},
}


class Text(HTMLParser):
    """The page's words, and whatever it would fetch."""

    def __init__(self, html):
        super().__init__()
        self.words: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ("src", "href") and not v.startswith(("#", "d"))]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def page(folder):
    return Text((folder / "report.html").read_text(encoding="utf-8"))


def test_a_finished_search_says_what_may_be_believed(make_plan, serial):
    search = {"trials": 5, "top": 1, "seeds": 2, "sampler": "random", "space": SPACE}
    plan = make_plan(search, confirm=True, evaluate={"resamples": 40})
    folder = tune.run(plan, executor=serial(plan))
    shown = page(folder)
    assert not shown.links
    for wanted in (
        "Winner over new seeds: trial-000",
        "that is how optimistic a search is",
        "Winner minus default",
        "The test split was looked at once",
        "History",
        "Importance (fANOVA)",
        "Worker-hours of training",
        "trial-0004",
    ):
        assert wanted in shown.text, wanted
    assert re.search(r"trial-0002 complete 0\.\d+ \d 0\.\d+ optim.lr=", shown.text)
    before = (folder / "report.html").read_text()
    tune.run(plan, executor=serial(plan))
    again = (folder / "report.html").read_text()
    assert again == before, "the same twice"


def test_an_unfinished_search_says_so_and_flags_an_edge(make_plan, serial):
    point = {"optim.lr": 0.1, "model.dropout": 0.2, "optim.schedule": "constant"}
    plan = make_plan({"trials": 1, "points": [point], "space": SPACE})
    folder = tune.run(plan, executor=serial(plan))
    more = make_plan({"trials": 3, "points": [point], "space": SPACE})
    study = Study(more.search, more.run, folder)
    report.write(study, more.run, more.folder)
    text = page(folder).text
    assert "2 trial(s) are still to go" in text
    assert "optim.lr: the best value 0.1 is at the highest edge" in text
    assert "it was not yet trained with other seeds nor tested" in text


@pytest.mark.slow
def test_failed_pruned_and_front_are_shown(make_plan, serial):
    space = {"train.epochs": {"grid": [2, 5]}, "train.min_epochs": {"grid": [1, 4]}}
    plan = make_plan(
        {"space": space, "sampler": "grid", "metrics": {"auprc": "max", "ece": "min"}},
        train={"epochs": 5, "batch_size": 24},
    )
    text = page(tune.run(plan, executor=serial(plan))).text
    assert "Pareto front" in text
    assert "train.min_epochs (4) is larger than train.epochs (2)" in text


def test_powers_of_ten_are_written_out():
    rates = [2e-5, 3e-4, 4e-3, 5e-2]
    svg = figures.value_slice(rates, [1, 2, 3, 4], path="lr", label="auroc", log=True, salt="x")
    words = re.findall(r">([^<>]+)</text>", svg)
    assert {"0.0001", "0.001", "0.01"} <= set(words)
    assert "$" not in "".join(words)


def test_rungs_count_who_reached_and_who_ended(make_plan):
    plan = make_plan({"space": SPACE, "trials": 9})
    study = Study(plan.search, plan.run, plan.folder.path)
    for last, ended in ((6, False), (2, True), (2, True), (4, True)):
        number = study.propose().number
        for epoch in range(1, last + 1):
            study.report(number, epoch, 0.5)
        if ended:
            study.pruned(number)
        else:
            study.complete(number, {"auroc": 0.5})
    assert report._rungs(study.trials) == [(2, 4, 2), (4, 2, 1)]


def test_importance_finds_what_matters(make_plan):
    plan = make_plan({"space": {k: SPACE[k] for k in ("optim.lr", "model.dropout")}, "trials": 40})
    study = Study(plan.search, plan.run, plan.folder.path)
    for _ in range(40):
        proposal = study.propose()
        study.complete(proposal.number, {"auroc": proposal.values["model.dropout"]})
    shares = report.importance(study, study.best(40))
    assert shares["model.dropout"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.slow
def test_two_searches_are_compared_on_the_same_patients(make_plan, serial):
    search = {"trials": 1, "top": 1, "seeds": 1, "space": SPACE}
    plans = [
        make_plan(
            {**search, "seed": seed}, f"search-{seed}", confirm=True, evaluate={"resamples": 40}
        )
        for seed in (0, 1)
    ]
    folders = [tune.run(plan, executor=serial(plan)) for plan in plans]
    text = compare(*folders)
    pair = "search-0 minus search-1, winners, same patients"
    assert re.search(pair + r": test auroc -?\d\.\d+ \(", text)
    assert re.search(r"trials +1 +1\n", text)
    same = compare(folders[0], folders[0])
    assert "same patients: test auroc 0.000 (0.000 to 0.000)" in same
    unfinished = make_plan(search, "unfinished")
    folder = tune.run(unfinished, executor=serial(unfinished))
    with pytest.raises(InputError, match="has no winner yet"):
        compare(folders[0], folder)
    with pytest.raises(InputError, match="no search in it"):
        compare(folders[0], folder / "trial-0000")
