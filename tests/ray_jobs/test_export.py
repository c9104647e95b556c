"""An export predicts as its run does, from shards and from plain tables, and nothing else of it."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from data.errors import InputError
from data.schema import CHANNELS, N_CHANNELS
from ray_jobs import evaluate, export, inference, predict
from ray_jobs import predictions as prediction_file
from ray_jobs.cli import app
from ray_jobs.runs import RunFolder

HELD = {
    "pH": (6.3, 8.4),
    "Fraction inspired oxygen": (0.21, 1.0),
    "Oxygen saturation": (0.0, 100.0),
    "Temperature": (26.0, 45.0),
}
"""Valid ranges that the fixture's values may leave."""


def _as_extracted(rows):
    """Series as an extraction fills them: an unobserved bin repeats the one before."""
    for row in rows:
        values = row["ehr"].reshape(-1, N_CHANNELS)
        observed = row["ehr_observed"].reshape(-1, N_CHANNELS)
        observed[0] = 1
        for step in range(1, len(values)):
            values[step] = np.where(observed[step] == 1, values[step], values[step - 1])
        for v, channel in enumerate(CHANNELS):
            if channel.name in HELD:
                np.clip(values[:, v], *HELD[channel.name], out=values[:, v])


@pytest.fixture(scope="module")
def trained(make_run, make_shards, tmp_path_factory):
    """An evaluated DrFuse run on shards of short side 256."""
    shards = tmp_path_factory.mktemp("export") / "shards"
    make_shards(shards, rows=40, task="phenotyping_48h", image_size=256, edit=_as_extracted)
    run = make_run(
        "drfuse",
        shards=shards,
        task="phenotyping_48h",
        batches={"image": {"resize": 48, "size": 32}, "zero_beyond": 10.0},
    )
    evaluate.run(run)
    return run


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """Its export; the run itself is moved away for good."""
    out = export.run(trained, tmp_path_factory.mktemp("exports") / "drfuse")
    shutil.move(trained, trained.with_name("moved-away"))
    return out


@pytest.fixture(scope="module")
def expected(exported, trained):
    """episode_id -> the probabilities that `rayfuse evaluate` found."""
    away = RunFolder(trained.with_name("moved-away"))
    found = prediction_file.read(away.evaluation("test") / prediction_file.FILE_NAME)
    ids = [str(one) for one in found.keys["stay_id"].to_pylist()]
    return dict(zip(ids, found.probabilities, strict=True))


@pytest.fixture(scope="module")
def shards(trained, exported):
    return inference.load_config(trained.with_name("moved-away")).data.shards


def _predicted(path):
    table = pq.read_table(path)
    values = np.stack([table[name].to_numpy() for name in table.column_names[1:]], 1)
    return dict(zip(table["episode_id"].to_pylist(), values, strict=True))


def _write_tables(shards, folder, suffix="csv"):
    """The shards' test rows as a user would give them."""
    import polars as pl

    (folder / "images").mkdir(parents=True)
    series, images, episodes = [], [], []
    parts = [pq.read_table(part).to_pylist() for part in sorted((shards / "shards").iterdir())]
    for row in (one for part in parts for one in part if one["split"] == "test"):
        name = str(row["stay_id"])
        values = np.array(row["ehr"], np.float32).reshape(-1, N_CHANNELS)
        observed = np.array(row["ehr_observed"]).reshape(-1, N_CHANNELS)
        episodes.append({"episode_id": name, "hours": float(len(values))})
        for step, v in zip(*observed.nonzero(), strict=True):
            levels = CHANNELS[v].levels
            value = values[step, v]
            text = levels[int(value)] if levels else repr(float(value))
            series.append((name, float(step + 1), CHANNELS[v].name, text))
        if row["cxr"] is not None:
            (folder / "images" / f"{name}.jpg").write_bytes(row["cxr"])
            images.append({"episode_id": name, "path": f"images/{name}.jpg"})
    names = ["episode_id", "hours", "channel", "value"]
    tables = {
        "series": pl.DataFrame(series, schema=names, orient="row").sample(
            fraction=1, shuffle=True, seed=0
        ),
        "images": pl.DataFrame(images),
        "episodes": pl.DataFrame(episodes),
    }
    for name, table in tables.items():
        path = folder / f"{name}.{suffix}"
        table.write_csv(path) if suffix == "csv" else table.write_parquet(path)


def test_an_export_holds_weights_preprocessing_card_and_hashes(exported):
    assert {path.name for path in exported.iterdir()} == {
        "model.safetensors",
        "config.json",
        "preprocessing.json",
        "README.md",
        "manifest.json",
    }
    steps = json.loads((exported / "preprocessing.json").read_text())
    assert [channel["name"] for channel in steps["channels"]] == [c.name for c in CHANNELS]
    assert [channel["unit"] for channel in steps["channels"] if "unit" in channel].count(
        "mmHg"
    ) == 3
    assert steps["zero_beyond"] == 10.0
    card = (exported / "README.md").read_text()
    for said in ("phenotyping_48h", "mimic-iv-2.2", "Credentialed", "AUROC", "no medical device"):
        assert said in card
    assert "| partial | AUROC | 0." in card
    for path in exported.iterdir():
        assert str(exported.parents[1]) not in path.read_bytes().decode("utf-8", "ignore")


def test_predictions_from_shards_are_those_of_evaluate(exported, expected, shards, tmp_path):
    out = tmp_path / "predictions.parquet"
    assert predict.run(exported, shards, out, batch_size=7) == 40
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    found = _predicted(out)
    assert len(expected) == 8
    for name, probabilities in expected.items():
        np.testing.assert_allclose(found[name], probabilities, atol=1e-6)
    labels = json.loads((exported / "config.json").read_text())["labels"]
    assert pq.read_schema(out).names == ["episode_id", *labels]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_predictions_from_tables_are_those_of_evaluate(
    exported, expected, shards, tmp_path, suffix
):
    _write_tables(shards, tmp_path / "input", suffix)
    command = ["predict", str(exported), str(tmp_path / "input")]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out.parquet")])
    assert result.exit_code == 0, result.output
    found = _predicted(tmp_path / "out.parquet")
    assert set(found) == set(expected)
    for name, probabilities in expected.items():
        np.testing.assert_allclose(found[name], probabilities, atol=1e-6)


def test_a_photograph_of_another_size_is_shrunk_as_an_extraction_does(exported, tmp_path):
    from data.images import shrink_image

    raw = (Path(__file__).parents[1] / "fixtures" / "cxr" / "7afaaccc.jpg").read_bytes()
    found = []
    for name, content in (("raw", raw), ("shrunk", shrink_image(raw, 256)[0])):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.jpg").write_bytes(content)
        (folder / "images.csv").write_text("episode_id,path\n1,a.jpg\n")
        (folder / "series.csv").write_text("episode_id,hours,channel,value\n1,2,pH,7.3\n")
        predict.run(exported, folder, tmp_path / f"{name}.parquet")
        found.append(_predicted(tmp_path / f"{name}.parquet")["1"])
    np.testing.assert_array_equal(*found)
    (tmp_path / "raw" / "images.csv").unlink()
    predict.run(exported, tmp_path / "raw", tmp_path / "without.parquet")
    assert not np.allclose(_predicted(tmp_path / "without.parquet")["1"], found[0], atol=1e-6)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessing.json"])
def test_an_altered_file_is_refused_by_its_hash(exported, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    data = bytearray((copy / name).read_bytes())
    data[-2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(InputError, match=rf"{name} is not the file that manifest\.json names"):
        export.load(copy)
    (copy / name).unlink()
    with pytest.raises(InputError, match=rf"{name}: missing"):
        export.load(copy)


def test_other_shards_are_refused_by_what_differs(exported, make_shards, tmp_path):
    make_shards(tmp_path / "mortality", rows=20, task="mortality", image_size=32)
    with pytest.raises(InputError, match="task 'mortality', but the export is of 'phenotyping_48h"):
        predict.run(exported, tmp_path / "mortality", tmp_path / "out.parquet")
    make_shards(tmp_path / "other", rows=20, task="phenotyping_48h", image_size=32)
    manifest = tmp_path / "other" / "manifest.json"
    value = json.loads(manifest.read_text())
    value["config"]["timestep_hours"] = 2.0
    manifest.write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"timestep_hours: 2\.0 here, 1\.0 in training"):
        predict.run(exported, tmp_path / "other", tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_where_an_export_may_go(make_run, tmp_path, exported):
    run = make_run("lstm")
    (tmp_path / "filled").mkdir()
    (tmp_path / "filled" / "mine").touch()
    with pytest.raises(InputError, match="holds files already"):
        export.run(run, tmp_path / "filled")
    assert [path.name for path in (tmp_path / "filled").iterdir()] == ["mine"]
    with pytest.raises(InputError, match="no run folder"):
        export.run(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(InputError, match=r"no export; `rayfuse export` writes one"):
        export.load(run)
    (tmp_path / "empty").mkdir()
    export.run(run, tmp_path / "empty")
    assert "Not evaluated" in (tmp_path / "empty" / "README.md").read_text()
    result = CliRunner().invoke(app, ["export", str(run)])
    assert result.exit_code == 0, result.output
    assert export.load(run / "export").spec.name == "phenotyping_48h"


def test_a_model_without_images_leaves_them_out(make_run, tmp_path):
    out = export.run(make_run("lstm"), tmp_path / "out")
    folder = tmp_path / "input"
    folder.mkdir()
    (folder / "broken.jpg").write_text("no image")
    (folder / "images.csv").write_text("episode_id,path\n1,broken.jpg\n")
    (folder / "series.csv").write_text("episode_id,hours,channel,value\n1,2,pH,7.3\n")
    assert predict.run(out, folder, tmp_path / "out.parquet") == 1


def test_a_model_of_images_alone_is_asked_by_image(make_run, make_shards, tmp_path):
    shards = tmp_path / "shards"
    make_shards(shards, rows=20, task="radiology", image_size=256)
    run = make_run("resnet34", shards=shards, task="radiology")
    evaluate.run(run)
    found = prediction_file.read(RunFolder(run).evaluation("test") / prediction_file.FILE_NAME)
    expected = dict(zip(found.keys["dicom_id"].to_pylist(), found.probabilities, strict=True))
    out = export.run(run, tmp_path / "out")
    folder = tmp_path / "input"
    folder.mkdir()
    rows = [
        row for part in (shards / "shards").iterdir() for row in pq.read_table(part).to_pylist()
    ]
    test = [row for row in rows if row["split"] == "test"]
    for row in test:
        (folder / f"{row['dicom_id']}.jpg").write_bytes(row["cxr"])
    lines = [f"{row['dicom_id']},{row['dicom_id']}.jpg" for row in test]
    (folder / "images.csv").write_text("\n".join(["episode_id,path", *lines]) + "\n")
    for source in (shards, folder):
        predict.run(out, source, tmp_path / "predictions.parquet")
        predicted = _predicted(tmp_path / "predictions.parquet")
        assert expected.keys() <= predicted.keys()
        for name, probabilities in expected.items():
            np.testing.assert_allclose(predicted[name], probabilities, atol=1e-6)


def test_a_gpu_that_is_not_there_is_named(exported, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="--gpu: PyTorch sees no GPU"):
        predict.run(exported, tmp_path, tmp_path / "out.parquet", gpu=True)
