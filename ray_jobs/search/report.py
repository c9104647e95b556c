"""One self-contained HTML report of a search, in the style of a run's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from data.errors import InputError
from data.files import write_text
from data.manifest import Manifest
from ray_jobs.evaluate import is_synthetic
from ray_jobs.report import interval_text, template
from ray_jobs.search import confirm, figures
from ray_jobs.search.alarm import alarms
from ray_jobs.search.cost import gpus_per_worker, worker_hours
from ray_jobs.search.trials import trial_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from optuna.trial import FrozenTrial

    from ray_jobs.config import RunConfig
    from ray_jobs.figures import Points
    from ray_jobs.search.folder import SearchFolder
    from ray_jobs.search.study import Study

TEMPLATE = "search.html.j2"
IMPORTANCE_TREES = 64
FEWEST_FOR_IMPORTANCE = 4
STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "unfinished",
    TrialState.WAITING: "not begun",
}


def write(study: Study, run: RunConfig, folder: SearchFolder) -> Path:
    """Write report.html of a search, finished or not; the file fetches nothing."""
    trials = study.trials
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    best = study.best(1)
    results = confirm.read(folder)
    chosen = _chosen(study, results)
    hours = {path.name: worker_hours(path / "metrics") for path in folder.runs()}
    html = template(TEMPLATE).render(
        name=folder.path.name,
        model=run.model.name,  # type: ignore[attr-defined]
        task=run.task,
        preset=run.preset,
        synthetic=_synthetic(run),
        search=study.search,
        states={name: sum(t.state == state for t in trials) for state, name in STATES.items()},
        left=study.unfinished,
        best=best[0] if best else None,
        best_name=trial_name(best[0].number) if best else "",
        alarms=[alarm.text() for alarm in alarms(study.search, run, chosen)],
        results=_shown(results),
        figures=_figures(study, done),
        slices=_slices(study, done),
        rungs=_rungs(trials),
        rows=[_row(study, trial, hours) for trial in trials],
        cost=_cost(run, hours),
    )
    write_text(folder.report, html)
    return folder.report


def _chosen(study: Study, results: dict[str, Any] | None) -> dict[str, Any]:
    """The values of the winner over the seeds, before there is one of the best trial."""
    if results and results["winner"]:
        rows = [row for row in results["candidates"] if row["name"] == results["winner"]]
        return dict(rows[0]["values"])
    best = study.best(1)
    return dict(best[0].user_attrs["values"]) if best else {}


def _synthetic(run: RunConfig) -> bool | None:
    try:
        return is_synthetic(Manifest.load(run.data.shards))
    except InputError:
        return None  # the shards are no longer there


def _shown(results: dict[str, Any] | None) -> dict[str, Any] | None:
    if results is None or not results["winner"]:
        return None
    test = results["test"] or {}
    return {
        **results,
        "tests": [
            (metric, *(interval_text(test[metric][key]) for key in ("winner", "default")),
             interval_text(test[metric]["difference"]))
            for metric in test
        ],
    }  # fmt: skip


def _figures(study: Study, done: Sequence[FrozenTrial]) -> list[str]:
    metrics = list(study.search.metrics.items())
    name, direction = metrics[0]
    if not done:
        return []
    points = [(float(trial.number), float(trial.values[0])) for trial in done]
    pick = max if direction == "max" else min
    running = [(x, pick(y for _, y in points[: n + 1])) for n, (x, _) in enumerate(points)]
    drawn = [figures.history(points, running, title="History", label=name, salt="history")]
    if len(metrics) == 2:
        both = [(trial.values[0], trial.values[1]) for trial in done]
        front = [(trial.values[0], trial.values[1]) for trial in study.best(len(done))]
        names = name, metrics[1][0]
        drawn.append(figures.front(both, front, names=names, salt="front"))
    if series := _series(study.trials):
        pruned = {trial_name(t.number) for t in study.trials if t.state == TrialState.PRUNED}
        drawn.append(figures.epochs(series, pruned, title="Epochs", label=name, salt="epochs"))
    shares = importance(study, done)
    if shares:
        title = "Importance (fANOVA)"
        drawn.append(figures.importance(shares, title=title, salt="importance"))
        drawn += _contour(study, done, shares)
    return drawn


def importance(study: Study, done: Sequence[FrozenTrial]) -> dict[str, float]:
    """Optuna's fANOVA shares of the first metric's variance; none of few trials or one path."""
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    paths = _common(done)
    varied = [path for path in paths if len({repr(t.params[path]) for t in done}) > 1]
    scores = {trial.values[0] for trial in done}
    if len(done) < FEWEST_FOR_IMPORTANCE or len(varied) < 2 or len(scores) < 2:
        return {}
    evaluator = FanovaImportanceEvaluator(n_trees=IMPORTANCE_TREES, seed=0)
    return get_param_importances(
        study.optuna, evaluator=evaluator, params=varied, target=lambda trial: trial.values[0]
    )


def _contour(study: Study, done: Sequence[FrozenTrial], shares: dict[str, float]) -> list[str]:
    numeric = [path for path in shares if _numeric([t.params[path] for t in done])]
    if len(numeric) < 2:
        return []
    first, second = sorted(numeric, key=lambda path: -shares[path])[:2]
    return [
        figures.contour(
            [trial.params[first] for trial in done],
            [trial.params[second] for trial in done],
            [trial.values[0] for trial in done],
            names=(first, second),
            logs=(_log(study, first), _log(study, second)),
            salt="contour",
        )
    ]


def _slices(study: Study, done: Sequence[FrozenTrial]) -> list[str]:
    name = next(iter(study.search.metrics))
    drawn = []
    for number, path in enumerate(study.search.space):
        having = [trial for trial in done if path in trial.params]
        if having:
            drawn.append(
                figures.value_slice(
                    [trial.params[path] for trial in having],
                    [trial.values[0] for trial in having],
                    path=path,
                    label=name,
                    log=_log(study, path),
                    salt=f"slice-{number}",
                )
            )
    return drawn


def _series(trials: Sequence[FrozenTrial]) -> dict[str, Points]:
    return {
        trial_name(trial.number): [(float(e), v) for e, v in trial.intermediate_values.items()]
        for trial in trials
        if trial.intermediate_values
    }


def _rungs(trials: Sequence[FrozenTrial]) -> list[tuple[int, int, int]]:
    """(epoch, trials that reached it, trials pruned there), for epochs where any was pruned."""
    last = {t.number: max(t.intermediate_values) for t in trials if t.intermediate_values}
    ended = [last[t.number] for t in trials if t.state == TrialState.PRUNED and t.number in last]
    return [
        (epoch, sum(reached >= epoch for reached in last.values()), ended.count(epoch))
        for epoch in sorted(set(ended))
    ]


def _row(study: Study, trial: FrozenTrial, hours: dict[str, float]) -> dict[str, Any]:
    values = trial.user_attrs.get("values", {})
    return {
        "name": trial_name(trial.number),
        "state": STATES[trial.state],
        "settings": "  ".join(f"{path}={_text(value)}" for path, value in values.items()),
        "scores": [_text(score) for score in trial.values or [None] * len(study.search.metrics)],
        "epoch": trial.user_attrs.get("epoch") or max(trial.intermediate_values, default=""),
        "hours": f"{hours.get(trial_name(trial.number), 0.0):.3f}",
        "reason": trial.user_attrs.get("reason", ""),
    }


def _cost(run: RunConfig, hours: dict[str, float]) -> dict[str, Any]:
    search = sum(value for name, value in hours.items() if "-seed-" not in name)
    whole = sum(hours.values())
    return {
        "search": f"{search:.2f}",
        "seeds": f"{whole - search:.2f}",
        "gpus": f"{gpus_per_worker(run.scaling) * whole:.2f}",
    }


def _common(done: Sequence[FrozenTrial]) -> list[str]:
    if not done:
        return []
    return [path for path in done[0].params if all(path in trial.params for trial in done)]


def _numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(each, int | float) and not isinstance(each, bool) for each in values)


def _log(study: Study, path: str) -> bool:
    return study.search.space[path].log is not None


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}"
    return str(value)
