"""The house rules that a machine can hold: imports, caps, cheap --help, what may be written."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "fusion", "ray_jobs")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FUSION_MAY_IMPORT_OF_DATA = {"schema", "config", "tasks", "ontology", "errors", "files"}
FILE_CAP, BODY_CAP = 400, 60


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _imports(path: Path) -> list[str]:
    """Absolute dotted names of everything a file imports, at any depth of nesting."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def _violation(module: str, imported: str) -> str | None:
    home, target = module.split(".")[0], imported.split(".")
    if home == "data" and target[0] in ("fusion", "ray_jobs"):
        return "data imports nothing of ours"
    if home == "fusion" and target[0] == "ray_jobs":
        return "fusion never imports jobs"
    if home == "fusion" and target[0] == "ray":
        return "fusion imports no Ray"
    if home == "fusion" and target[0] == "data" and target[1] not in FUSION_MAY_IMPORT_OF_DATA:
        return f"fusion may import only {sorted(FUSION_MAY_IMPORT_OF_DATA)} of data"
    return _violation_inside_fusion(module, target) or _violation_of_ray(module, target)


def _violation_inside_fusion(module: str, target: list[str]) -> str | None:
    a_model = target[:2] == ["fusion", "models"] and len(target) > 2
    if a_model and module != ".".join(target[:3]):
        return "a model is reached through the registry, never imported"
    foreign = target[0] in ("torch", "fusion") and target[:2] != ["fusion", "metrics"]
    if module.startswith("fusion.metrics") and foreign:
        return "metrics knows numpy only"
    lower = ("fusion.encoders", "fusion.layers", "fusion.losses")
    if module.startswith(lower) and target[:2] in (["fusion", "training"], ["fusion", "models"]):
        return "blocks know neither training nor models"
    return None


def _violation_of_ray(module: str, target: list[str]) -> str | None:
    allowed_in_data = ("data.pipeline", "data.stage")
    if target[0] == "ray" and module.startswith("data.") and module not in allowed_in_data:
        return f"the only Ray imports in data/ are in {allowed_in_data}"
    return None


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_imports_point_one_way(path: Path) -> None:
    module = _module(path)
    wrong = [f"{name}: {why}" for name in _imports(path) if (why := _violation(module, name))]
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("data.cohort", "fusion.model"),
        ("fusion.training.loop", "ray.train"),
        ("fusion.training.loop", "fusion.models.drfuse"),
        ("fusion.models.medfuse2", "fusion.models.medfuse.MedFuse"),
        ("fusion.metrics.ranking", "torch"),
        ("fusion.layers.pool", "data.pipeline"),
        ("data.cohort", "ray.data"),
    ],
)
def test_the_guard_sees_what_it_guards_against(module: str, imported: str) -> None:
    assert _violation(module, imported)


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_files_and_bodies_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= FILE_CAP
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body
            described = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
            first = body[1] if described and len(body) > 1 else body[0]
            assert (node.end_lineno or 0) - first.lineno + 1 <= BODY_CAP, node.name


def test_no_init_files_under_tests() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_help_is_cheap() -> None:
    script = (
        "import sys\n"
        "from ray_jobs.cli import app\n"
        "try:\n"
        "    app(['--help'])\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'transformers', 'polars', 'pyarrow', 'sklearn',\n"
        "         'matplotlib', 'numpy', 'pandas'}\n"
        "found = heavy & set(sys.modules)\n"
        "assert not found, found\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_nothing_unpickles(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = [word for word in node.keywords if word.arg == "weights_only"]
            assert safe, "torch.load needs weights_only=True"
            assert ast.unparse(safe[0].value) == "True"
    assert not {"pickle", "dill", "cloudpickle", "joblib"} & {
        name.split(".")[0] for name in _imports(path)
    }
