"""Counting, cutting, the log, init_from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from data.errors import InputError
from data.schema import MODALITIES
from fusion.model import FusionModel, Output, Phase, Term
from fusion.tasks import Task
from fusion.training import metrics_log
from fusion.training.config import TrainConfig
from fusion.training.initialise import initial_weights
from fusion.training.objective import Objective, census, cut, even, placeholder, population
from fusion.training.predict import Predictions, merge, selection_score, validation_scores
from fusion.training.progress import Progress
from fusion.training.strategy import Single


def test_the_census_counts_every_set_of_modalities(harness):
    rows = harness.dataset(17)
    batch = harness.collate(rows)
    counts = census(batch, harness.Toy())
    for over in ((), ("ehr",), ("cxr",), ("ehr", "cxr"), ("notes",)):
        wanted = sum(all(row.get(f"has_{modality}") for modality in over) for row in rows)
        assert int(population(counts, over)) == wanted
    assert not census(None, harness.Toy()).any()
    assert len(counts) == 2 ** len(MODALITIES)


@hypothesis_settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 17), parts=st.integers(1, 9))
def test_cutting_keeps_every_row_and_image_once(harness, rows, parts):
    made = harness.dataset(rows)
    batch = harness.collate(made)
    filler = placeholder(harness.SPEC, (3, 32, 32))
    pieces = cut(batch, even(rows, parts), filler)
    assert len(pieces) == parts
    real = [piece.batch for piece in pieces if piece.weight]
    assert all(piece.batch is filler for piece in pieces if not piece.weight)
    assert [row for piece in real for row in piece.rows.tolist()] == list(range(rows))
    sizes = [len(piece) for piece in real]
    assert max(sizes) - min(sizes) <= 1
    for piece in real:
        again = harness.collate([made[row] for row in piece.rows])
        assert torch.equal(piece.ehr, again.ehr)
        assert torch.equal(piece.cxr, again.cxr)
        assert torch.equal(piece.cxr_index, again.cxr_index)
        assert torch.equal(piece.cxr_targets, again.cxr_targets)
        assert torch.equal(piece.targets, again.targets)


def test_cutting_takes_notes_and_labs_along(harness):
    """Rows 0, 2, 3 and 6 of seven have a note."""
    index = [0, 2, 3, 6]
    batch = replace(
        harness.collate(harness.dataset(7)),
        notes=tuple(f"note {row}" for row in index),
        notes_index=torch.tensor(index),
        lab_texts=tuple(f"labs {row}" for row in range(7)),
        labs=torch.arange(7.0)[:, None].expand(7, 2),
        labs_observed=torch.arange(7)[:, None].expand(7, 2) % 2 == 0,
        draws=np.arange(7, dtype=np.uint64),
    )
    filler = placeholder(harness.SPEC, (3, 32, 32))
    pieces = [piece.batch for piece in cut(batch, even(7, 3), filler)]
    assert [piece.rows.tolist() for piece in pieces] == [[0, 1], [2, 3, 4], [5, 6]]
    for piece in pieces:
        rows = piece.rows.tolist()
        assert piece.notes == tuple(f"note {row}" for row in rows if row in index)
        assert [rows[each] for each in piece.notes_index] == [row for row in rows if row in index]
        assert piece.lab_texts == tuple(f"labs {row}" for row in rows)
        assert piece.labs.tolist() == [[row, row] for row in rows]
        assert piece.labs_observed.tolist() == [[row % 2 == 0] * 2 for row in rows]
        assert piece.draws.tolist() == rows


class Counting(FusionModel):
    """Its term is a sum over the series' steps."""

    counted = ("steps",)

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, batch):
        logits = self.scale * torch.ones(len(batch), 3)
        return Output(logits, {}, {"steps": Term(batch.lengths.sum() * self.scale.sum() / 3)})

    def counts(self, batch):
        return batch.lengths.sum()[None].double()


def test_a_term_that_the_model_counts_is_divided_by_the_values_of_the_whole_step(harness):
    rows, model = harness.dataset(7), Counting()
    objective = Objective(model, Task(harness.SPEC), TrainConfig())
    shares = [harness.collate(rows[:5]), harness.collate(rows[5:]), None]
    counts = sum(census(share, model) for share in shares)
    filler = placeholder(harness.SPEC, (3, 32, 32))
    losses = []
    for share in shares:
        for part in cut(share, even(len(share), 2) if share else [[]], filler):
            loss, sums = objective(part, counts, Phase(terms=("steps",)))
            losses.append(loss)
            assert sums["steps"][1] == sum(len(row["ehr"]) for row in rows)
    assert len(losses) == 5
    torch.testing.assert_close(sum(losses).item(), 1.0)


def predictions(**changes):
    targets = np.array([[0, 1], [1, 1], [0, 1]])
    probabilities = np.array([[0.1, 0.2], [0.9, 0.3], [0.2, 0.4]])
    made = Predictions(np.arange(3), targets, probabilities, probabilities)
    return replace(made, **{"counted": {"steps": (6.0, 4.0)}, **changes})


def test_a_counted_term_may_select_whatever_the_labels():
    scores = validation_scores(predictions(), "steps")
    assert next(iter(scores.items())) == ("steps", 1.5)
    assert scores["auroc"] == 1.0
    no_label = predictions(targets=np.ones((3, 2)))
    assert validation_scores(no_label, "steps").keys() == {"steps", "f1", "ece"}
    with pytest.raises(InputError, match="no label with both classes"):
        validation_scores(no_label, "auroc")
    with pytest.raises(InputError, match=r"3 rows\) has no value of steps"):
        validation_scores(predictions(counted={"steps": (0.0, 0.0)}), "steps")
    assert "steps" not in validation_scores(predictions(counted={"steps": (0.0, 0.0)}), "auroc")


def test_counted_terms_of_workers_are_added():
    assert merge([predictions(), predictions()]).counted == {"steps": (12.0, 8.0)}


def test_the_lowest_loss_is_best_and_the_highest_score():
    for metric, better, worse in (("steps", 0.1, 0.3), ("auroc", 0.3, 0.1)):
        progress, lowest = Progress(), TrainConfig(selection_metric=metric).lowest_is_best
        found = [progress.record(score, lowest=lowest) for score in (0.2, worse, better)]
        assert found == [True, False, True]
        assert progress.best_score == better


def test_the_score_leaves_out_labels_of_one_class():
    targets = np.array([[0, 1], [1, 1], [0, 1]])
    probabilities = np.array([[0.1, 0.2], [0.9, 0.3], [0.2, 0.4]])
    assert selection_score(targets, probabilities, "auroc") == 1.0
    with pytest.raises(InputError, match="no label with both classes"):
        selection_score(targets[:, 1:], probabilities[:, 1:], "auprc")


def test_what_a_killed_attempt_wrote_beyond_its_checkpoint_is_left_out(tmp_path):
    first = metrics_log.MetricsLog(tmp_path)
    first.write("event", Progress(), {"event": "start", "updates": 0, "world": 1})
    for update in (1, 2, 3, 4):
        first.write("train", Progress(updates=update), {"loss": float(update)})
        if update == 2:
            first.rotate()
    first.close()
    with (tmp_path / "attempt-1" / "part-00002.jsonl").open("a") as handle:
        handle.write('{"kind": "train", "ep')
    second = metrics_log.MetricsLog(tmp_path)
    second.write("event", Progress(), {"event": "start", "updates": 2, "world": 1})
    second.write("train", Progress(updates=3), {"loss": float("nan")})
    second.close()
    assert second.attempt == 2
    lines = metrics_log.read(tmp_path)
    losses = [line["values"]["loss"] for line in lines if line["kind"] == "train"]
    assert losses == [1.0, 2.0, None], "JSON has no NaN"
    assert len(list((tmp_path / "tensorboard").rglob("*tfevents*"))) == 2


def fill(model, sources):
    strategy = Single()
    strategy.model = model
    strategy.load_weights(initial_weights(strategy.shapes(), sources))


def test_a_submodule_starts_from_a_weights_file(harness, tmp_path):
    source, target = harness.Toy(), harness.Toy()
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    before = target.head.weight.clone()
    fill(target, {"ehr": tmp_path / "weights.safetensors"})
    assert torch.equal(target.ehr.weight, source.ehr.weight)
    assert torch.equal(target.ehr.bias, source.ehr.bias)
    assert torch.equal(target.head.weight, before)
    fill(target, {"": tmp_path / "weights.safetensors"})
    assert torch.equal(target.head.weight, source.head.weight)


@pytest.mark.parametrize(
    ("prefix", "change", "message"),
    [
        ("eher", {}, "no such submodule; it has ehr, cxr"),
        ("norm2", {}, "no such submodule"),
        ("ehr", {"ehr.bias": None}, r"has no 'ehr\.bias'; it holds cxr, ehr"),
        ("ehr", {"ehr.bias": torch.zeros(3)}, r"ehr\.bias has shape \(3,\)"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(harness, tmp_path, prefix, change, message):
    state = {**harness.Toy().state_dict(), **change}
    path = tmp_path / "weights.safetensors"
    save_file({name: value for name, value in state.items() if value is not None}, path)
    with pytest.raises(InputError, match=message):
        fill(harness.Toy(), {prefix: path})


def test_a_missing_source_is_refused(harness, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        fill(harness.Toy(), {"ehr": tmp_path / "nowhere"})
