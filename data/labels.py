"""The 25 phenotype labels of an admission, from its diagnosis codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from data import ontology
from data.errors import InputError
from data.tasks import PHENOTYPES

if TYPE_CHECKING:
    from data.switches import ExtractConfig

N_LABELS = len(PHENOTYPES)
_KEY = ["icd_version", "icd_code"]
_ICD9, _ICD10 = 9, 10


def phenotype_labels(
    diagnoses: pl.DataFrame, dictionary: pl.DataFrame | None, config: ExtractConfig
) -> pl.DataFrame:
    """Label admissions with the CCS groups of their diagnoses.

    `icd_join = version_code` keys on the version and the code, blanks and dots removed, and needs
    no dictionary. `icd_join = code` does what the released code does: rows are joined with the
    dictionary on the code alone, as written, so that a code without an entry drops out and a code
    of both versions appears twice; neither changes a label that is already there.

    Args:
        diagnoses: hadm_id, icd_code, icd_version; one row a diagnosis.
        dictionary: icd_code, icd_version of the release's dictionary; only read for `code`.
        config: Its `icd10_map` and `icd_join` decide.

    Returns:
        hadm_id (unique, sorted) and labels, a list of 25 float32 of 0 and 1. An admission without
        any diagnosis row (after the dictionary, for `code`) has no row.

    Raises:
        InputError: `icd_join = code` without a dictionary.
    """
    coded = _joined(diagnoses, dictionary, config)
    admissions = coded.select(pl.col("hadm_id").unique().sort()).drop_nulls()
    mapped = _mapping(coded.select(_KEY).unique(), config)
    positive = coded.join(mapped, on=_KEY, how="inner").select("hadm_id", "label").unique()
    lists = positive.group_by("hadm_id").agg(pl.col("label"))
    labels = admissions.join(lists, on="hadm_id", how="left", maintain_order="left")
    multi_hot = pl.concat_list(
        pl.col("label").list.contains(label).fill_null(value=False).cast(pl.Float32)
        for label in range(N_LABELS)
    )
    return labels.select("hadm_id", multi_hot.alias("labels"))


def _joined(
    diagnoses: pl.DataFrame, dictionary: pl.DataFrame | None, config: ExtractConfig
) -> pl.DataFrame:
    kept = diagnoses.select("hadm_id", pl.col("icd_version").cast(pl.Int8), "icd_code")
    if config.icd_join == "version_code":
        clean = pl.col("icd_code").str.strip_chars().str.replace_all(".", "", literal=True)
        return kept.with_columns(clean.str.to_uppercase())
    if dictionary is None:
        raise InputError(
            "icd_join is `code`, which joins diagnoses with the release's dictionary of diagnoses, "
            "but the dictionary table is missing; add it or set icd_join to version_code"
        )
    return kept.join(dictionary.select("icd_code"), on="icd_code", how="inner")


def _mapping(codes: pl.DataFrame, config: ExtractConfig) -> pl.DataFrame:
    """icd_version, icd_code, label of the codes that have any."""
    table = ontology.phenotype_map(config.icd10_map)
    if config.icd_join == "code":
        by_code = table.select("icd_code", "label").unique()
        return codes.join(by_code, on="icd_code", how="inner")
    if config.icd10_map != "resolved":
        return codes.join(table, on=_KEY, how="inner")
    icd9 = codes.join(table.filter(pl.col("icd_version") == _ICD9), on=_KEY, how="inner")
    of_icd10 = [
        (_ICD10, code, label)
        for code in codes.filter(pl.col("icd_version") == _ICD10)["icd_code"].drop_nulls()
        for label in ontology.resolved_labels(code)
    ]
    return pl.concat([icd9, pl.DataFrame(of_icd10, schema=table.schema, orient="row")])
