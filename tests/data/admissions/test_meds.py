"""MEDS datasets: the open MIMIC-IV demo in that form gives the samples that its tables give."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from data.admission_stage import ingest_admissions, ingest_meds
from data.errors import InputError
from data.extraction import extract_partition
from data.sources.clinical import open_admissions
from data.sources.meds import canonical_tables, meds_rows, open_meds
from data.sources.release import open_release
from data.splits import assign_split
from data.stage import load_tables
from data.switches import AdmissionConfig, ExtractConfig, MedsCodes
from data.tasks import task_spec

DEMO = Path(__file__).parents[3] / "data" / "demo" / "mimic-iv"
CODES = MedsCodes()
SETTINGS = AdmissionConfig(abnormal="range", require_notes=False)
CONFIG = ExtractConfig(admissions=SETTINGS, availability="charttime")


def of_demo(name: str) -> pl.DataFrame:
    return pl.read_csv(DEMO / f"{name}.csv.gz", infer_schema=False)


def rows_of(frame: pl.DataFrame, time: str, code: pl.Expr, **values: pl.Expr) -> pl.DataFrame:
    nothing = {"numeric_value": pl.lit(None), "text_value": pl.lit(None), "hadm_id": pl.lit(None)}
    return frame.select(
        pl.col("subject_id").cast(pl.Int64),
        pl.col(time).str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="us").alias("time"),
        code.alias("code"),
        *((values.get(name, nothing[name])).alias(name) for name in nothing),
    ).with_columns(
        pl.col("numeric_value").cast(pl.Float32),
        pl.col("text_value").cast(pl.String),
        pl.col("hadm_id").cast(pl.Int64),
    )


def write_demo(folder: Path, *, hadm_id: bool) -> Path:
    """The demo's people, admissions, diagnoses and labs as MEDS, with splits and descriptions."""
    admissions, patients = of_demo("hosp/admissions"), of_demo("hosp/patients")
    number = {"hadm_id": pl.col("hadm_id").cast(pl.Int64)} if hadm_id else {}
    years = patients.with_columns(
        (pl.col("anchor_year").cast(pl.Int64) - pl.col("anchor_age").cast(pl.Int64))
        .cast(pl.String)
        .add("-01-01 00:00:00")
        .alias("born")
    )
    labs = of_demo("hosp/labevents")
    ends = admissions.select("hadm_id", "dischtime")
    diagnoses = of_demo("hosp/diagnoses_icd").join(ends, on="hadm_id")
    unit = pl.col("valueuom").fill_null("UNK")
    version, code = pl.col("icd_version"), pl.col("icd_code")
    events = pl.concat(
        [
            rows_of(years, "born", pl.lit("MEDS_BIRTH")),
            rows_of(
                years.with_columns(born=None).cast({"born": pl.String}),
                "born",
                pl.format("GENDER//{}", "gender"),
            ),
            rows_of(admissions, "admittime", pl.lit("HOSPITAL_ADMISSION//EW EMER.//ED"), **number),
            rows_of(admissions, "dischtime", pl.lit("HOSPITAL_DISCHARGE//HOME"), **number),
            rows_of(
                diagnoses, "dischtime", pl.format("DIAGNOSIS//ICD//{}//{}", version, code), **number
            ),
            rows_of(
                labs,
                "charttime",
                pl.format("LAB//{}//{}", "itemid", unit),
                numeric_value=pl.col("valuenum").cast(pl.Float64),
                text_value=pl.col("value"),
                hadm_id=pl.col("hadm_id").cast(pl.Int64) if hadm_id else pl.lit(None),
            ),
        ]
    ).sort("subject_id", "time")
    (folder / "data" / "train").mkdir(parents=True)
    (folder / "metadata").mkdir()
    shown = events if hadm_id else events.drop("hadm_id")
    middle = shown["subject_id"].median()
    for name, part in (("0", pl.col("subject_id") < middle), ("1", pl.col("subject_id") >= middle)):
        shown.filter(part).write_parquet(folder / "data" / "train" / f"{name}.parquet")
    subjects = events["subject_id"].unique().sort()
    names = pl.Series("split", ["train", "train", "tuning", "held_out"] * len(subjects))
    pl.DataFrame({"subject_id": subjects, "split": names.head(len(subjects))}).write_parquet(
        folder / "metadata" / "subject_splits.parquet"
    )
    described = of_demo("hosp/d_labitems").join(
        labs.select("itemid", unit.alias("unit")).unique(), on="itemid"
    )
    described.select(
        pl.format("LAB//{}//{}", "itemid", "unit").alias("code"),
        pl.col("label").alias("description"),
    ).write_parquet(folder / "metadata" / "codes.parquet")
    (folder / "metadata" / "dataset.json").write_text('{"dataset_name": "MIMIC-IV Demo"}')
    return folder


@pytest.fixture(scope="module")
def from_tables(tmp_path_factory) -> pl.DataFrame:
    release = open_admissions(open_release(DEMO))
    work = tmp_path_factory.mktemp("tables")
    staged = ingest_admissions(release, None, work, 1)
    tables = load_tables(work, staged.files_of(0))
    return extract_partition(tables, task_spec("diagnoses_femh"), CONFIG).samples


def from_meds(folder: Path, work: Path) -> pl.DataFrame:
    source = open_meds(folder)
    assert source.name == "meds-mimic-iv-demo"
    staged = ingest_meds(source, CODES, work, 3)
    parts = [
        extract_partition(
            load_tables(work, staged.files_of(part)), task_spec("diagnoses_femh"), CONFIG
        ).samples
        for part in range(3)
    ]
    return pl.concat(parts).sort("subject_id", "prediction_time")


@pytest.mark.parametrize("hadm_id", [True, False])
def test_the_demo_gives_the_samples_of_its_tables(tmp_path, from_tables, hadm_id):
    folder = write_demo(tmp_path / "meds", hadm_id=hadm_id)
    samples = from_meds(folder, tmp_path / "work")
    expected = from_tables.sort("subject_id", "prediction_time")
    assert expected.height > 100
    if not hadm_id:
        # An admission whose results all lie outside its hours loses them with the id.
        assert samples.height > 0.9 * expected.height
        expected = expected.join(samples, on=["subject_id", "prediction_time"], how="semi")
    assert samples.height == expected.height
    same = ["subject_id", "prediction_time", "sex", "labels", "lab_items", "lab_units"]
    if hadm_id:
        same.append("hadm_id")
        assert samples["lab_text"].to_list() == expected["lab_text"].to_list()
    else:
        # Results outside an admission's hours had its id, and only that id told so.
        inside = samples["lab_items"].list.len() <= expected["lab_items"].list.len()
        assert inside.all()
        same = same[:4]
    for column in same:
        assert samples[column].to_list() == expected[column].to_list(), column
    assert samples["hadm_id"].n_unique() == samples.height


def test_the_splits_are_the_data_sets_own(tmp_path, from_tables):
    folder = write_demo(tmp_path / "meds", hadm_id=True)
    samples = from_meds(folder, tmp_path / "work")
    given = pl.read_parquet(folder / "metadata" / "subject_splits.parquet")
    joined = samples.join(given, on="subject_id", suffix="_given")
    names = {"train": "train", "tuning": "val", "held_out": "test"}
    assert (joined["split"] == joined["split_given"].replace_strict(names)).all()
    assert set(samples["split"]) == {"train", "val", "test"}
    assert not samples["split"].equals(from_tables["split"])


def event(subject: int, day: float, code: str, **values: object) -> dict[str, object]:
    start = datetime(2150, 1, 1)  # noqa: DTZ001
    row = {"subject_id": subject, "time": start + timedelta(days=day), "code": code}
    return {**row, "numeric_value": None, "text_value": None, "hadm_id": None, **values}


def test_visits_without_ids_are_paired_in_time():
    rows = [
        event(1, 0, "HOSPITAL_ADMISSION//X"),
        event(1, 3, "HOSPITAL_DISCHARGE//X"),
        event(1, 4, "DIAGNOSIS//ICD//10//I10"),
        event(1, 20, "DIAGNOSIS//ICD//10//I50"),
        event(1, 30, "HOSPITAL_ADMISSION//X"),
        event(1, 31, "HOSPITAL_ADMISSION//X"),
        event(1, 35, "HOSPITAL_DISCHARGE//X"),
        event(1, 35, "DIAGNOSIS//ICD//9//4280"),
        event(1, 35, "NOTE//Discharge summary", text_value="Chief Complaint:\nx"),
        event(1, 40, "HOSPITAL_ADMISSION//X"),
        event(2, 1, "HOSPITAL_DISCHARGE//X"),
    ]
    meds = pl.DataFrame(rows).cast({"numeric_value": pl.Float64, "hadm_id": pl.Int64})
    tables = canonical_tables(meds.with_columns(pl.col("text_value").cast(pl.String)), CODES)
    visits = tables["admissions"].sort("admittime")
    start = datetime(2150, 1, 1)  # noqa: DTZ001
    ends = [(time - start).days if time else None for time in visits["dischtime"]]
    assert ends == [3, None, 35, None]
    ids = visits["hadm_id"].to_list()
    assert len(set(ids)) == 4
    found = dict(tables["diagnoses"].select("icd_code", "hadm_id").iter_rows())
    assert found == {"I10": ids[0], "I50": None, "4280": ids[2]}
    assert tables["notes"]["hadm_id"].to_list() == [ids[2]]


@pytest.mark.parametrize(
    ("damage", "needle"),
    [
        ("nothing", r"no data/\*\.parquet"),
        ("column", "no column code"),
        ("type", "column subject_id is"),
        ("bytes", "not a readable Parquet"),
    ],
)
def test_faults_of_a_dataset(tmp_path, damage, needle):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "0.parquet"
    frame = pl.DataFrame([event(1, 0, "secret note text")]).cast({"numeric_value": pl.Float32})
    if damage == "column":
        frame.drop("code").write_parquet(path)
    elif damage == "type":
        frame.cast({"subject_id": pl.String}).write_parquet(path)
    elif damage == "bytes":
        path.write_bytes(b"secret note text")
    with pytest.raises(InputError, match=needle) as caught:
        open_meds(tmp_path)
    assert "secret" not in str(caught.value)


WRONG_TYPES = {
    "subject_id": (pl.lit(1.5), "double, not an integer"),
    "time": (pl.lit("2150-01-01"), "large_string, not a timestamp"),
    "code": (pl.lit(7), "int32, not a text"),
    "numeric_value": (pl.lit("7.4"), "large_string, not a number"),
    "text_value": (pl.lit(b"\xff"), "large_binary, not a text"),
    "hadm_id": (pl.lit("h-7"), "large_string, not a number"),
}


@pytest.mark.parametrize("column", WRONG_TYPES)
def test_a_column_of_another_type_is_named(tmp_path, column):
    value, needle = WRONG_TYPES[column]
    (tmp_path / "data").mkdir()
    frame = pl.DataFrame([event(1, 0, "HOSPITAL_ADMISSION")])
    frame.with_columns(value.alias(column)).write_parquet(tmp_path / "data" / "0.parquet")
    with pytest.raises(InputError, match=rf"0\.parquet: column {column} is {needle}"):
        open_meds(tmp_path)


@pytest.mark.parametrize(
    ("column", "value", "why"),
    [
        ("subject_id", pl.lit(None, pl.Int64), "is missing"),
        ("code", pl.lit(None, pl.String), "is missing"),
        ("time", pl.lit(10**18).cast(pl.Datetime("us")), "is outside the years 1 to 9999"),
        ("hadm_id", pl.lit(0.5), "is no integer"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, column, value, why):
    (tmp_path / "data").mkdir()
    visit = event(1, 0, "HOSPITAL_ADMISSION", numeric_value=1.0, text_value="note", hadm_id=7)
    frame = pl.DataFrame([visit] * 3).cast({"hadm_id": value_type(column)})
    spoiled = pl.when(pl.int_range(pl.len()) == 1).then(value).otherwise(pl.col(column))
    frame.with_columns(spoiled.alias(column)).write_parquet(tmp_path / "data" / "0.parquet")
    with pytest.raises(InputError, match=rf"0\.parquet: row 2: {column} {why}") as caught:
        list(meds_rows(open_meds(tmp_path), CODES))
    assert "note" not in str(caught.value)


def value_type(column: str) -> pl.DataType:
    """Pandas writes ids with gaps as floats; whole ones are read."""
    return pl.Float64() if column == "hadm_id" else pl.Int64()


def test_what_belongs_to_no_admission_is_counted():
    visits = [
        event(1, start, code)
        for start, code in (
            (0, "HOSPITAL_ADMISSION"),
            (3, "HOSPITAL_DISCHARGE"),
            (30, "HOSPITAL_ADMISSION"),
            (33, "HOSPITAL_DISCHARGE"),
        )
    ]
    untimed = {**event(1, 0, "HOSPITAL_ADMISSION"), "time": None}
    rows = [
        *visits,
        untimed,
        event(1, -20_000, "MEDS_BIRTH"),
        event(1, 3, "DIAGNOSIS//ICD//10//I10"),
        event(1, 33, "DIAGNOSIS//ICD//10//I10"),
        event(1, 20, "DIAGNOSIS//ICD//10//I50"),
        {**event(1, 3, "DIAGNOSIS//ICD//10//I50"), "time": None},
        event(1, 20, "NOTE//Discharge summary", text_value="Chief Complaint:\nx"),
        event(1, 2, "LAB//50983//mEq/L", numeric_value=128.0),
        event(1, 32, "LAB//50983//mEq/L", numeric_value=128.0),
    ]
    schema = {"text_value": pl.String, "numeric_value": pl.Float64, "hadm_id": pl.Int64}
    meds = pl.DataFrame(rows, schema_overrides=schema, infer_schema_length=None)
    tables = {**load_tables(Path(), []), "meds": meds}
    result = extract_partition(tables, task_spec("diagnoses"), CONFIG)
    assert result.samples.height == 2
    assert result.counters["diagnoses of no admission"] == 2
    assert result.counters["admissions split by a hash of their subject"] == 2
    assert result.counters["lab results of tests without a common range"] == 2, "no names here"
    steps = {step.rule: (step.rows_in, step.rows_out) for step in result.flow}
    assert steps["times in order"] == (3, 2)
    assert steps["summary of an admission of the cohort"] == (1, 0)
    (aside,) = result.quarantine
    assert (aside.reason, aside.count) == ("times missing or out of order", 1)


@pytest.mark.parametrize("order", ["as written", "shuffled", "one file a row of seven"])
def test_neither_the_order_of_rows_nor_their_files_matter(tmp_path, from_tables, order):
    folder = write_demo(tmp_path / "meds", hadm_id=True)
    expected = from_tables.sort("subject_id", "prediction_time")
    for path in (folder / "data").rglob("*.parquet"):
        frame = pl.read_parquet(path)
        if order == "shuffled":
            frame.sample(fraction=1, shuffle=True, seed=1).write_parquet(path)
        elif order != "as written":
            path.unlink()
            for part in range(7):
                frame.gather_every(7, part).write_parquet(path.with_stem(f"{path.stem}-{part}"))
    samples = from_meds(folder, tmp_path / "work")
    for column in ("hadm_id", "labels", "lab_items", "labs", "lab_text"):
        assert samples[column].to_list() == expected[column].to_list(), column


def test_a_subject_without_a_given_split_is_split_by_its_hash(tmp_path):
    folder = write_demo(tmp_path / "meds", hadm_id=True)
    path = folder / "metadata" / "subject_splits.parquet"
    whole = pl.read_parquet(path)
    named = whole.head(20).with_columns(split=pl.lit("held_out"))
    named.write_parquet(path)
    samples = from_meds(folder, tmp_path / "work")
    given = samples["subject_id"].is_in(named["subject_id"].implode())
    assert set(samples.filter(given)["split"]) == {"test"}
    rest = samples.filter(~given)
    assert rest["split"].equals(assign_split(rest["subject_id"], CONFIG.split))
    assert samples.group_by("subject_id").agg(pl.col("split").n_unique())["split"].max() == 1


@pytest.mark.parametrize("name", ["codes", "subject_splits"])
def test_damaged_metadata_is_named(tmp_path, name):
    folder = write_demo(tmp_path / "meds", hadm_id=True)
    path = folder / "metadata" / f"{name}.parquet"
    first = pl.read_parquet(path).columns[0]
    other = pl.lit(7) if name == "codes" else pl.lit("a")
    needles = ("not a readable Parquet", f"column {first} is", f"no columns {first} and")
    for number, needle in enumerate(needles):
        frame = pl.read_parquet(path)
        if number == 0:
            path.write_bytes(b"PAR1")
        elif number == 1:
            frame.with_columns(other.alias(first)).write_parquet(path)
        else:
            frame.drop(first).write_parquet(path)
        with pytest.raises(InputError, match=rf"{name}\.parquet: {needle}"):
            ingest_meds(open_meds(folder), CODES, tmp_path / str(number), 1)
        frame.write_parquet(path)


def test_unknown_and_double_splits_are_refused(tmp_path):
    folder = write_demo(tmp_path / "meds", hadm_id=True)
    path = folder / "metadata" / "subject_splits.parquet"
    source = open_meds(folder)
    pl.DataFrame({"subject_id": [1, 2], "split": ["train", "dev"]}).write_parquet(path)
    with pytest.raises(InputError, match="unknown split 'dev'"):
        ingest_meds(source, CODES, tmp_path / "a", 1)
    pl.DataFrame({"subject_id": [1, 1], "split": ["train", "tuning"]}).write_parquet(path)
    with pytest.raises(InputError, match="subject_id 1 is in two splits"):
        ingest_meds(source, CODES, tmp_path / "b", 1)
