"""Arrow, Polars and DuckDB on one partition's events: the step that every extraction repeats.

    python benchmarks/engines.py FILE.csv.gz [--repeats 3] [--out FILE]

Each engine, in a process of its own, reads a .csv.gz of chart events, keeps the items of the 17
variables, types the kept rows and takes the last value for each (stay, hour, item). Two threads.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ["stay_id", "itemid", "charttime", "value"]


def _items() -> list[int]:
    from data.events import item_ids

    return sorted(item_ids("mimic-iv-2.2", "chart"))


def run_polars(path: Path) -> int:
    import polars as pl

    names = pl.scan_csv(path).collect_schema().names()
    schema: dict[str, pl.DataType] = dict.fromkeys(names, pl.String())
    kinds = {"itemid": pl.Int64(), "stay_id": pl.Int64(), "charttime": pl.Datetime("us")}
    return (
        pl.scan_csv(path, schema=schema | kinds)
        .select(COLUMNS)
        .filter(pl.col("itemid").is_in(_items()))
        .sort("charttime")
        .group_by("stay_id", pl.col("charttime").dt.truncate("1h"), "itemid")
        .agg(pl.col("value").last())
        .collect()
        .height
    )


def run_polars_blocks(path: Path) -> int:
    """This package's reader, then Polars."""
    import polars as pl

    from data.sources.mimic4 import TABLES
    from data.sources.release import open_table
    from data.sources.tables import TableReader, read_whole

    spec = next(spec for spec in TABLES if spec.table == "chartevents")
    file = open_table("chartevents", path)
    frame = read_whole(TableReader(file, spec, items=frozenset(_items())))
    hour = pl.col("charttime").dt.truncate("1h")
    grouped = frame.sort("charttime").group_by("stay_id", hour, "itemid")
    return grouped.agg(pl.col("value").last()).height


def run_arrow(path: Path) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv as pv

    options = pv.ConvertOptions(
        include_columns=COLUMNS,
        column_types={"value": pa.string(), "charttime": pa.timestamp("us")},
        null_values=[""],
        strings_can_be_null=True,
    )
    items = pa.array(_items())
    batches = []
    with pv.open_csv(path, convert_options=options) as reader:
        for batch in reader:
            kept = batch.filter(pc.is_in(batch.column("itemid"), value_set=items))
            batches.append(kept)
    table = pa.Table.from_batches(batches).sort_by("charttime")
    hour = pc.floor_temporal(table["charttime"], unit="hour")
    table = table.set_column(2, "hour", hour)
    grouped = table.group_by(["stay_id", "hour", "itemid"], use_threads=False)
    return grouped.aggregate([("value", "last")]).num_rows


def run_duckdb(path: Path) -> int:
    import duckdb

    connection = duckdb.connect()
    connection.execute("set threads = 2")
    ids = ", ".join(map(str, _items()))
    row = connection.execute(
        f"""
        select count(*) from (
            select stay_id, date_trunc('hour', charttime) as hour, itemid,
                   last(value order by charttime) as value
            from read_csv(?, all_varchar = false, types = {{'value': 'VARCHAR',
                          'valuenum': 'VARCHAR', 'charttime': 'TIMESTAMP'}})
            where itemid in ({ids}) group by all)
        """,
        [str(path)],
    ).fetchone()
    return int(row[0])


ENGINES = {
    "polars": run_polars,
    "polars, text blocks (chosen)": run_polars_blocks,
    "arrow": run_arrow,
    "duckdb": run_duckdb,
}


def _spent() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/engines.json")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.engine:
        wall, cpu = time.perf_counter(), _spent()
        groups = ENGINES[given.engine](given.file)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        figures = {"wall_s": time.perf_counter() - wall, "cpu_s": _spent() - cpu}
        print(json.dumps({**figures, "peak_rss_mb": peak, "groups": groups}))
        return
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "POLARS_MAX_THREADS": "2"}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in ENGINES}
    for _ in range(given.repeats):
        for name in ENGINES:
            command = [sys.executable, __file__, str(given.file), "--engine", name]
            done = subprocess.run(command, check=True, capture_output=True, env=environment)
            results[name].append(json.loads(done.stdout.decode().splitlines()[-1]))
    counted = {run["groups"] for runs in results.values() for run in runs}
    if len(counted) != 1:
        raise SystemExit(f"the engines disagree: {counted}")
    best = {name: min(runs, key=lambda run: run["cpu_s"]) for name, runs in results.items()}
    print(json.dumps(best, indent=2))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    value = {"gzip_mb": given.file.stat().st_size / 1e6, "best_of": given.repeats, "engines": best}
    given.out.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
