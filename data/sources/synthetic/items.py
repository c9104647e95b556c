"""Items of the event tables: ids, labels, units and the texts that stand in their values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One row of an item dictionary, and the unit that its events carry."""

    itemid: int
    label: str
    unit: str = ""
    source: str = "metavision"  # or carevue, or lab
    category: str = "Routine Vital Signs"


# Vital signs: for each channel of VITALS two MetaVision ids (cuff and arterial,
# Fahrenheit and Celsius, ...) and CareVue's.
VITAL_ITEMS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "Heart Rate": ((220045, 220045), (211, 211)),
    "Respiratory rate": ((220210, 220210), (618, 618)),
    "Systolic blood pressure": ((220179, 220050), (455, 51)),
    "Diastolic blood pressure": ((220180, 220051), (8441, 8368)),
    "Mean blood pressure": ((220181, 220052), (456, 52)),
    "Oxygen saturation": ((220277, 220277), (646, 646)),
    "Temperature": ((223761, 223762), (678, 676)),
    "Glucose": ((225664, 220621), (807, 811)),
}

ITEMS: tuple[Item, ...] = (
    Item(220045, "Heart Rate", "bpm"),
    Item(220210, "Respiratory Rate", "insp/min", category="Respiratory"),
    Item(220179, "Non Invasive Blood Pressure systolic", "mmHg"),
    Item(220180, "Non Invasive Blood Pressure diastolic", "mmHg"),
    Item(220181, "Non Invasive Blood Pressure mean", "mmHg"),
    Item(220050, "Arterial Blood Pressure systolic", "mmHg"),
    Item(220051, "Arterial Blood Pressure diastolic", "mmHg"),
    Item(220052, "Arterial Blood Pressure mean", "mmHg"),
    Item(220277, "O2 saturation pulseoxymetry", "%", category="Respiratory"),
    Item(223761, "Temperature Fahrenheit", "°F"),
    Item(223762, "Temperature Celsius", "°C"),
    Item(223835, "Inspired O2 Fraction", "", category="Respiratory"),
    Item(220739, "GCS - Eye Opening", "", category="Neurological"),
    Item(223901, "GCS - Motor Response", "", category="Neurological"),
    Item(223900, "GCS - Verbal Response", "", category="Neurological"),
    Item(225664, "Glucose finger stick (range 70-100)", "mg/dL", category="Labs"),
    Item(220621, "Glucose (serum)", "mg/dL", category="Labs"),
    Item(223830, "PH (Arterial)", "units", category="Labs"),
    Item(226707, "Height", "Inch", category="General"),
    Item(226730, "Height (cm)", "cm", category="General"),
    Item(226512, "Admission Weight (Kg)", "kg", category="General"),
    Item(226531, "Admission Weight (lbs.)", "", category="General"),
    Item(224639, "Daily Weight", "kg", category="General"),
    Item(223951, "Capillary Refill R", "", category="Skin"),
    Item(211, "Heart Rate", "BPM", "carevue"),
    Item(618, "Respiratory Rate", "BPM", "carevue"),
    Item(455, "NBP [Systolic]", "mmHg", "carevue"),
    Item(8441, "NBP [Diastolic]", "mmHg", "carevue"),
    Item(456, "NBP Mean", "mmHg", "carevue"),
    Item(51, "Arterial BP [Systolic]", "mmHg", "carevue"),
    Item(8368, "Arterial BP [Diastolic]", "mmHg", "carevue"),
    Item(52, "Arterial BP Mean", "mmHg", "carevue"),
    Item(646, "SpO2", "%", "carevue"),
    Item(678, "Temperature F", "Deg. F", "carevue"),
    Item(676, "Temperature C", "Deg. C", "carevue"),
    Item(3420, "FIO2", "%", "carevue"),
    Item(184, "Eye Opening", "", "carevue"),
    Item(454, "Motor Response", "", "carevue"),
    Item(723, "Verbal Response", "", "carevue"),
    Item(198, "GCS Total", "points", "carevue"),
    Item(811, "Glucose (70-105)", "", "carevue"),
    Item(807, "Fingerstick Glucose", "", "carevue"),
    Item(780, "Arterial pH", "", "carevue"),
    Item(1394, "Height Inches", "", "carevue"),
    Item(763, "Daily Weight", "kg", "carevue"),
    Item(3581, "Present Weight  (lb)", "", "carevue"),
    Item(3348, "Capillary Refill", "", "carevue"),
)

# Charted, but none of the 17 variables: what fills the greater part of the real table.
FILLER: tuple[Item, ...] = tuple(
    Item(itemid, label, unit, category=category)
    for itemid, label, unit, category in (
        (220046, "Heart rate Alarm - High", "bpm", "Alarms"),
        (220047, "Heart Rate Alarm - Low", "bpm", "Alarms"),
        (223751, "Non-Invasive Blood Pressure Alarm - High", "mmHg", "Alarms"),
        (223752, "Non-Invasive Blood Pressure Alarm - Low", "mmHg", "Alarms"),
        (223769, "O2 Saturation Pulseoxymetry Alarm - High", "%", "Alarms"),
        (223770, "O2 Saturation Pulseoxymetry Alarm - Low", "%", "Alarms"),
        (224161, "Resp Alarm - High", "insp/min", "Alarms"),
        (224162, "Resp Alarm - Low", "insp/min", "Alarms"),
        (220074, "Central Venous Pressure", "mmHg", "Hemodynamics"),
        (220339, "PEEP set", "cmH2O", "Respiratory"),
        (224685, "Tidal Volume (observed)", "mL", "Respiratory"),
        (224686, "Tidal Volume (spontaneous)", "mL", "Respiratory"),
        (224687, "Minute Volume", "L/min", "Respiratory"),
        (224695, "Peak Insp. Pressure", "cmH2O", "Respiratory"),
        (224697, "Mean Airway Pressure", "cmH2O", "Respiratory"),
        (223791, "Pain Level", "", "Pain/Sedation"),
    )
)
FILLER_TEXT: tuple[tuple[Item, tuple[str, ...]], ...] = tuple(
    (Item(itemid, label, "", category=category), texts)
    for itemid, label, category, texts in (
        (220048, "Heart Rhythm", "Routine Vital Signs", ("SR (Sinus Rhythm)", "AF", "None")),
        (223781, "Pain Present", "Pain/Sedation", ("Yes", "No", "Unable to assess")),
        (224093, "Position", "Treatments", ("Left Side", "Supine", 'Lying in "Fowlers" position')),
        (
            226104,
            "Level of Consciousness",
            "Neurological",
            ("Alert", "Arouse to Voice, then sleeps"),
        ),
        (223986, "RUL Lung Sounds", "Respiratory", ("Clear", "Crackles", "Diminished, coarse")),
    )
)

# GCS texts by score, from the worst: MetaVision's and CareVue's.
EYE = (
    ("None", "To Pain", "To Speech", "Spontaneously"),
    ("1 No Response", "2 To pain", "3 To speech", "4 Spontaneously"),
)
MOTOR = (
    (
        "No response",
        "Abnormal extension",
        "Abnormal Flexion",
        "Flex-withdraws",
        "Localizes Pain",
        "Obeys Commands",
    ),
    (
        "1 No Response",
        "2 Abnorm extensn",
        "3 Abnorm flexion",
        "4 Flex-withdraws",
        "5 Localizes Pain",
        "6 Obeys Commands",
    ),
)
VERBAL = (
    ("No Response-ETT", "Incomprehensible sounds", "Inappropriate Words", "Confused", "Oriented"),
    ("1.0 ET/Trach", "2 Incomp sounds", "3 Inapprop words", "4 Confused", "5 Oriented"),
)
REFILL = (
    ("Normal <3 Seconds", "Abnormal >3 Seconds"),
    ("Normal <3 secs", "Abnormal >3 secs"),
)
BAD_TEXT = ("ERROR", ">100", "UNABLE TO OBTAIN", "<10", "___")

LABS: tuple[Item, ...] = (
    Item(50931, "Glucose", "mg/dL", "lab", "Chemistry"),
    Item(50809, "Glucose", "mg/dL", "lab", "Blood Gas"),
    Item(50820, "pH", "units", "lab", "Blood Gas"),
    Item(50817, "Oxygen Saturation", "%", "lab", "Blood Gas"),
    Item(50983, "Sodium", "mEq/L", "lab", "Chemistry"),
    Item(50971, "Potassium", "mEq/L", "lab", "Chemistry"),
    Item(50912, "Creatinine", "mg/dL", "lab", "Chemistry"),
    Item(51006, "Urea Nitrogen", "mg/dL", "lab", "Chemistry"),
    Item(51222, "Hemoglobin", "g/dL", "lab", "Hematology"),
    Item(51301, "White Blood Cells", "K/uL", "lab", "Hematology"),
)
LAB_LEVELS = (
    (128.0, 25.0, 0),
    (132.0, 25.0, 0),
    (7.39, 0.05, 2),
    (96.0, 2.0, 0),
    (139.0, 4.0, 0),
    (4.1, 0.4, 1),
    (1.2, 0.3, 1),
    (24.0, 8.0, 0),
    (10.4, 1.5, 1),
    (10.5, 3.5, 1),
)
OUTPUT = Item(226559, "Foley", "mL", "metavision", "Output")
OUTPUT_CAREVUE = Item(40055, "Urine Out Foley", "ml", "carevue", "Output")

UNITS: dict[int, str] = {i.itemid: i.unit for i in (*ITEMS, *FILLER, *LABS, OUTPUT, OUTPUT_CAREVUE)}
