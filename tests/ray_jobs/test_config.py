"""RunConfig: precedence, presets, overrides, stages, and errors that teach."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import yaml

from data.errors import InputError
from data.switches import ExtractConfig
from ray_jobs import config as run_config

if TYPE_CHECKING:
    from pathlib import Path

RUN = {
    "name": "a-run",
    "task": "mortality",
    "model": {"name": "medfuse"},
    "data": {"shards": "shards/ihm"},
}


LABS = {"task": "diagnoses", "model": {"name": "mltm"}}
CACHED = {"train": {"cache_embeddings": True}}


def _images(**transform: object) -> dict:
    return {"shards": "s", "batches": {"image": transform}}


@pytest.fixture
def write(tmp_path: Path):
    def _write(**changes: object) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**RUN, **changes}), encoding="utf-8")
        return path

    return _write


def test_precedence_is_schema_preset_file_override(write) -> None:
    (schema,) = run_config.load(write())
    (preset,) = run_config.load(write(preset="code"))
    (in_file,) = run_config.load(write(preset="code", optim={"betas": [0.5, 0.6]}))
    (override,) = run_config.load(
        write(preset="code", optim={"betas": [0.5, 0.6]}), ["optim.betas=[0.1, 0.2]"]
    )
    found = [run.optim.betas for run in (schema, preset, in_file, override)]
    assert found == [(0.9, 0.999), (0.9, 0.9), (0.5, 0.6), (0.1, 0.2)]


def test_a_preset_line_for_one_model_leaves_the_others_alone(write) -> None:
    (drfuse,) = run_config.load(write(preset="code", model={"name": "drfuse"}))
    (medfuse,) = run_config.load(write(preset="code"))
    assert drfuse.data.batches.zero_beyond == 10.0
    assert medfuse.data.batches.zero_beyond is None
    assert drfuse.optim.betas == (0.9, 0.999)


def test_round_trip_through_the_dump(write, tmp_path: Path) -> None:
    (run,) = run_config.load(write(preset="code"), ["optim.lr=3e-4"])
    run_config.dump(run, tmp_path / "config.yaml")
    dumped = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert run_config.from_dump(dumped) == run
    assert type(run.model) is type(run_config.from_dump(dumped).model)


def test_stages_share_what_stands_beside_them(write) -> None:
    path = write(stages=[{"name": "first"}, {"name": "second", "optim": {"lr": 0.5}}])
    first, second = run_config.load(path, ["train.epochs=3"])
    assert (first.name, second.name) == ("first", "second")
    assert (first.train.epochs, second.train.epochs) == (3, 3)
    assert second.optim.lr == 0.5
    assert first.optim.lr != 0.5


def test_everything_wrong_is_reported_at_once_with_its_path(write) -> None:
    path = write(optim={"lrr": 1e-3}, train={"epochs": "many", "batch_size": 0}, task="mortality")
    with pytest.raises(InputError) as caught:
        run_config.load(path)
    message = str(caught.value)
    assert "optim.lrr: unknown key; did you mean 'lr'?" in message
    assert "train.epochs" in message
    assert "train.batch_size" in message
    assert str(path) in message


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"model": {"name": "medfus"}}, "did you mean 'medfuse'"),
        ({"model": {"name": "medfuse", "dropuot": 0.1}}, "dropuot"),
        ({"task": "mortalty"}, "unknown task"),
        ({"task": "radiology", "model": {"name": "lstm"}}, "lstm reads ehr, but task=radiology"),
        ({"model": {"name": "early_fusion"}}, r"init_from\.ehr_encoder=runs/lstm"),
        ({"preset": "published"}, "choose corrected, code or paper"),
        ({"name": "../escape"}, "name"),
        ({"train": {"epochs": 2, "min_epochs": 5}}, "train.min_epochs"),
        (
            {"train": {"selection_metric": "masked"}},
            "no such score; choose one of auroc, auprc, f1$",
        ),
        (
            {**LABS, "train": {"selection_metric": "maskd"}},
            "choose one of auroc, auprc, f1, masked, seen",
        ),
        (
            {**LABS, "data": {"shards": "s", "batches": {"labs": {"top": 200}}}},
            r"model\.items \(100\) is less than data\.batches\.labs\.top \(200\)",
        ),
        ({"scaling": {"num_workers": 2, "strategy": "single"}}, "scaling.strategy"),
        ({"scaling": {"strategy": "zero4"}}, r"scaling\.strategy"),
        ({"scaling": {"offload": "optimizer"}}, "scaling: offload=optimizer with strategy=ddp"),
        ({"scaling": {"strategy": "zero2", "offload": "all"}}, "only zero3 shards the parameters"),
        ({"scaling": {"num_workers": [2, 1]}}, r"scaling\.num_workers: needs .*\[fewest, most\]"),
        ({"scaling": {"num_workers": 0}}, r"scaling\.num_workers: needs a number of workers"),
        (
            CACHED,
            r"images are augmented: set data\.batches\.image\.augment=false, or train\.cache_",
        ),
        (
            {**CACHED, "data": _images(augment=False, crop="random")},
            r"cache_embeddings: .* at random: set data\.batches\.image\.crop=center",
        ),
        (
            {
                **CACHED,
                "data": _images(augment=False),
                "model": {"name": "medfuse", "missing_image": "zero_image"},
            },
            r"set model\.missing_image=not_encoded",
        ),
        ({**CACHED, "model": {"name": "mmtm"}}, r"model\.name=mmtm has no image encoder for it"),
        (
            {"data": {"shards": "s", "sources": {"mimic_iv": "a", "mimic_iii": "b"}}},
            "mimic_iv and mimic_iii",
        ),
        ({"data": {"shards": "s", "extract": {"split": {"fractions": [0.7, 0.1, 0.1]}}}}, "sum"),
    ],
)
def test_contradictions_and_typos_name_the_key(write, changes: dict, needle: str) -> None:
    with pytest.raises(InputError, match=needle):
        run_config.load(write(**changes))


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\x00"])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"run\.yaml"):
        run_config.load(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        run_config.load(tmp_path / "absent.yaml")


def test_an_override_without_a_value(write) -> None:
    with pytest.raises(InputError, match=r"dotted\.path=value"):
        run_config.load(write(), ["optim.lr"])


def test_extraction_switches_follow_the_preset() -> None:
    assert run_config.extract_config("corrected") == ExtractConfig()
    assert run_config.extract_config("code").units == "as_found"
    assert run_config.extract_config("code", ["units=read"]).units == "read"
    with pytest.raises(InputError, match="did you mean 'units'"):
        run_config.extract_config("code", ["unit=read"])


@pytest.mark.parametrize("preset", ["corrected", "code", "paper"])
@pytest.mark.parametrize("model", ["medfuse", "drfuse", "lstm", "mmtm"])
def test_every_preset_builds_a_run(write, preset: str, model: str) -> None:
    (run,) = run_config.load(write(preset=preset, model={"name": model}))
    assert run.preset == preset
