"""Tables of episodes: bins as an extraction makes them, and each fault by file, row and column."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from data.episodes import UNITS, Episodes, Rules
from data.errors import InputError
from data.schema import CHANNELS
from data.series import NORMAL
from data.tasks import task_spec

RULES = Rules(timestep_hours=1.0, clip=True, image_short_side=64)
NAMES = [channel.name for channel in CHANNELS]
PH, HEART, EYE, TOTAL, REFILL = (
    NAMES.index(name)
    for name in (
        "pH",
        "Heart Rate",
        "Glascow coma scale eye opening",
        "Glascow coma scale total",
        "Capillary refill rate",
    )
)
HEAD = "episode_id,hours,channel,value"


def read(folder, series, *, task="phenotyping", rules=RULES, head=HEAD, **tables):
    folder.mkdir(exist_ok=True)
    if series is not None:
        (folder / "series.csv").write_text("\n".join([head, *series]) + "\n")
    for name, lines in tables.items():
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return Episodes(folder, task_spec(task), rules)


def test_values_fall_into_the_bins_of_an_extraction(tmp_path):
    """Bins are (k, k + 1]; the last of a bin wins, an empty one repeats, first stands normal."""
    rows = [
        "b,3.0,Heart Rate,90",
        "b,0,Heart Rate,70",
        "b,2.5,Heart Rate,80",
        "a,0.5,pH,7.1",
        "b,1.25,Glascow coma scale eye opening,3 To speech",
        "b,1.5,Glascow coma scale total,11.0",
        "b,1.5,Capillary refill rate,1",
    ]
    found = read(tmp_path, rows)
    assert found.ids == ("a", "b")
    series = found.series(np.array([1, 0]))
    assert series.lengths.tolist() == [3, 1]
    assert series.values[:3, HEART].tolist() == [70, 70, 90]
    assert series.observed[:3, HEART].tolist() == [1, 0, 1]
    eye = CHANNELS[EYE].levels.index("3 To speech")
    assert series.values[:3, EYE].tolist() == [NORMAL[EYE], eye, eye]
    assert series.values[2, TOTAL] == CHANNELS[TOTAL].levels.index("11")
    assert series.values[2, REFILL] == 1
    assert series.values[3, PH] == np.float32(7.1)
    assert series.values[3, HEART] == NORMAL[HEART]
    assert found.series(np.array([1]), max_steps=2).lengths.tolist() == [2]


@pytest.mark.parametrize(
    ("task", "episodes", "steps"),
    [
        ("phenotyping", None, 2),
        ("phenotyping", "a,5.5", 6),
        ("phenotyping_48h", "a,60", 48),
        ("mortality", None, 48),
    ],
)
def test_an_episode_is_as_long_as_its_task_says(tmp_path, task, episodes, steps):
    tables = {"episodes": ["episode_id,hours", episodes]} if episodes else {}
    found = read(tmp_path, ["a,1.5,pH,7.1"], task=task, **tables)
    assert found.series(np.array([0])).lengths.tolist() == [steps]


def test_values_are_held_to_the_valid_range_as_in_an_extraction(tmp_path):
    rows = ["a,1,Oxygen saturation,120", "a,1,pH,9"]
    v = NAMES.index("Oxygen saturation")
    for clip, expected in ((True, (100, 8.4)), (False, (120, 9))):
        found = read(tmp_path, rows, rules=Rules(1.0, clip, 64)).series(np.array([0])).values
        assert found[0, [v, PH]].tolist() == pytest.approx(expected)


def test_parquet_numbers_and_text_mean_the_same(tmp_path):
    frame = pl.DataFrame(
        {"episode_id": [7, 7], "hours": [1, 2], "channel": ["pH", "pH"], "value": [7.25, 7.5]}
    )
    tmp_path.joinpath("p").mkdir()
    frame.write_parquet(tmp_path / "p" / "series.parquet")
    numbers = read(tmp_path / "p", None)
    text = read(tmp_path / "c", ["7,1,pH,7.25", "7,2,pH,7.5"])
    assert numbers.ids == text.ids == ("7",)
    for one in (numbers, text):
        assert one.series(np.array([0])).values[:, PH].tolist() == [7.25, 7.5]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("a,x,pH,7", r"row 2, column hours: 'x': no number"),
        ("a,-1,pH,7", r"row 2, column hours: '-1': before admission"),
        ("a,99999,pH,7", r"row 2, column hours: '99999': more than a year"),
        ("a,2,ph,7", r"row 2, column channel: 'ph': unknown; did you mean 'pH'\?"),
        ("a,2,Hart rate,7", r"did you mean 'Heart Rate'\?"),
        ("a,2,pH,acid", r"row 2, column value: 'acid': no number; pH is one"),
        ("a,2,Temperature,98.6", r"within 14\.2 to 47 °C; is it in °C\?"),
        ("a,2,pH,nan", r"no number"),
        ("a,2,Glascow coma scale total,2", r"column value: '2': no level of .* total; it has 11"),
        ("a,1,pH,7.2", r"row 2, column hours: '1': a second value of this channel at this time"),
        (",2,pH,7.2", r"row 2, column episode_id: None: empty"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, said):
    with pytest.raises(InputError, match=rf"series\.csv: .*{said}"):
        read(tmp_path, ["a,1,pH,7.1", row, "a,3,pH,7.1"])


@pytest.mark.parametrize(
    ("head", "row", "said"),
    [
        ("episode_id,hours,chanel,value", "a,1,pH,7", "unknown column 'chanel'; did you mean"),
        ("episode_id,hours,channel", "a,1,pH", "column 'value' is missing"),
        (f"{HEAD},unit", "a,1,Temperature,98.6,F", "row 1, column unit: 'F': Temperature is in °C"),
    ],
)
def test_a_bad_column_or_unit_is_named(tmp_path, head, row, said):
    with pytest.raises(InputError, match=said):
        read(tmp_path, [row], head=head)


def test_the_named_units_are_accepted(tmp_path):
    numeric = [(n, c.normal) for n, c in zip(NAMES, CHANNELS, strict=True) if not c.levels]
    rows = [f"a,1,{name},{value},{UNITS[name]}" for name, value in numeric]
    assert len(read(tmp_path, rows, head=f"{HEAD},unit")) == 1
    assert set(UNITS) == set(NAMES)


@pytest.mark.parametrize(
    ("task", "tables", "said"),
    [
        (
            "phenotyping_48h",
            {},
            r"row 1, column hours: '50': task phenotyping_48h predicts at 48 h",
        ),
        ("phenotyping", {"episodes": ["episode_id,hours", "a,9"]}, "after the episode's end"),
        ("phenotyping", {"episodes": ["episode_id,hours", "b,99"]}, "not in episodes.csv"),
        ("phenotyping", {"episodes": ["episode_id,hours", "a,99", "a,98"]}, "comes twice"),
        ("phenotyping", {"images": ["episode_id,path", "a,gone.jpg"]}, "gone.jpg': no such file"),
        (
            "phenotyping",
            {"images": ["episode_id,path", "a,series.csv", "a,series.csv"]},
            "several images",
        ),
        ("phenotyping", {"images": ["episode_id,path", "b,series.csv"]}, "'b' has no row in ser"),
        ("radiology", {"images": ["episode_id,path", "a,series.csv"]}, "reads images only"),
    ],
)
def test_tables_that_disagree_are_refused(tmp_path, task, tables, said):
    with pytest.raises(InputError, match=said):
        read(tmp_path, ["a,50,pH,7.1"], task=task, **tables)


def test_an_image_that_cannot_be_read_is_named_by_its_row(tmp_path):
    found = read(
        tmp_path,
        ["a,1,pH,7", "b,1,pH,7"],
        images=["episode_id,path", "b,series.csv"],
    )
    assert found.has_cxr.tolist() == [False, True]
    with pytest.raises(
        InputError, match=r"images\.csv: row 1, column path: .*neither JPEG nor PNG"
    ):
        found.image(1)


def test_a_folder_without_tables_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"neither series\.parquet"):
        read(tmp_path, None)
    (tmp_path / "series.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"both series\.parquet and series\.csv"):
        read(tmp_path, ["a,1,pH,7"])
    (tmp_path / "series.csv").unlink()
    with pytest.raises(InputError, match=r"series\.parquet: cannot be read"):
        read(tmp_path, None)
