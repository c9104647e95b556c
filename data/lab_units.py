"""Units of laboratory results: spellings of one unit, and conversions to one unit a test."""

from __future__ import annotations

from typing import Final

_SPELLINGS: Final = {
    "10^3/ul": "k/ul",
    "10*3/ul": "k/ul",
    "10e3/ul": "k/ul",
    "10^9/l": "k/ul",
    "10*9/l": "k/ul",
    "x10^9/l": "k/ul",
    "x10^3/ul": "k/ul",
    "thou/ul": "k/ul",
    "10^6/ul": "m/ul",
    "10*6/ul": "m/ul",
    "10^12/l": "m/ul",
    "10*12/l": "m/ul",
    "mil/ul": "m/ul",
    "percent": "%",
    "mg%": "mg/dl",
    "gm/dl": "g/dl",
    "iu/l": "u/l",
    "units/l": "u/l",
    "mcg/dl": "ug/dl",
    "mcg/ml": "ug/ml",
    "mcg/l": "ug/l",
    "mcmol/l": "umol/l",
}
_MASS: Final = {"g/l": ("g/dl", 0.1), "mg/l": ("mg/dl", 0.1), "ug/l": ("ug/dl", 0.1)}
"""Mass per litre to mass per decilitre, for any test."""
_MOLAR: Final = (
    # Part of the test's name, the unit found, the unit meant, and the factor (1 / molar mass).
    ("glucose", "mmol/l", "mg/dl", 18.016),
    ("creatinine", "umol/l", "mg/dl", 1 / 88.42),
    ("urea nitrogen", "mmol/l", "mg/dl", 2.801),
    ("cholesterol", "mmol/l", "mg/dl", 38.67),
    ("triglyceride", "mmol/l", "mg/dl", 88.57),
    ("bilirubin", "umol/l", "mg/dl", 1 / 17.10),
    ("calcium", "mmol/l", "mg/dl", 4.008),
    ("magnesium", "mmol/l", "mg/dl", 2.431),
    ("phosphate", "mmol/l", "mg/dl", 3.097),
    ("sodium", "mmol/l", "meq/l", 1.0),
    ("potassium", "mmol/l", "meq/l", 1.0),
    ("chloride", "mmol/l", "meq/l", 1.0),
    ("bicarbonate", "mmol/l", "meq/l", 1.0),
    ("anion gap", "mmol/l", "meq/l", 1.0),
    ("lactate", "mg/dl", "mmol/l", 1 / 9.008),
)

NORMAL: Final[dict[str, tuple[str, float, float]]] = {
    "sodium": ("meq/l", 133.0, 145.0),
    "potassium": ("meq/l", 3.3, 5.1),
    "chloride": ("meq/l", 96.0, 108.0),
    "bicarbonate": ("meq/l", 22.0, 32.0),
    "urea nitrogen": ("mg/dl", 6.0, 20.0),
    "creatinine": ("mg/dl", 0.5, 1.2),
    "glucose": ("mg/dl", 70.0, 105.0),
    "calcium, total": ("mg/dl", 8.4, 10.3),
    "magnesium": ("mg/dl", 1.6, 2.6),
    "phosphate": ("mg/dl", 2.7, 4.5),
    "lactate": ("mmol/l", 0.5, 2.0),
    "ph": ("units", 7.35, 7.45),
    "oxygen saturation": ("%", 95.0, 100.0),
    "hemoglobin": ("g/dl", 12.0, 17.5),
    "hematocrit": ("%", 36.0, 52.0),
    "white blood cells": ("k/ul", 4.0, 11.0),
    "platelet count": ("k/ul", 150.0, 440.0),
    "albumin": ("g/dl", 3.5, 5.2),
    "bilirubin, total": ("mg/dl", 0.0, 1.5),
}
"""Common adult ranges by test, in the unit of `convert`: used where a hospital gives no flag."""


def unit_name(unit: str | None) -> str:
    """One spelling for one unit: lower case, no blanks, the micro sign as u; empty for none."""
    text = "".join((unit or "").lower().split()).replace("\u00b5", "u").replace("\u03bc", "u")
    return _SPELLINGS.get(text, text)


def conversion(name: str, unit: str | None) -> tuple[str, float]:
    """The unit that a test's results are brought to, and the factor from the unit found.

    A unit that nothing is known of stays as it is, with factor 1: the lab scaler then keeps it
    apart from the test's usual unit.

    Args:
        name: The test's name.
        unit: As recorded.
    """
    found, test = unit_name(unit), name.lower()
    for part, source, target, factor in _MOLAR:
        if part in test and found == source:
            return target, factor
    return _MASS.get(found, (found, 1.0))
