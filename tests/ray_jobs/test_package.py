"""What a submitted job's working directory holds, and what it must never hold."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from data.errors import InputError
from ray_jobs import package

ROOT = Path(__file__).parents[2]
KEY = "-----BEGIN OPENSSH " + "PRIVATE KEY-----\nAAAA\n"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the three packages, one file each."""
    for name in package.PACKAGES:
        (tmp_path / "clone" / name).mkdir(parents=True)
        (tmp_path / "clone" / name / "__init__.py").write_text("", encoding="utf-8")
    return tmp_path / "clone"


def _names(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_the_uploaded_package_runs_alone(tmp_path: Path) -> None:
    """Unpacked with nothing else of ours in sight, it loads every config and knows its version."""
    built = package.build(tmp_path / "a.zip", {"run.yaml": "name: x\n"})
    with zipfile.ZipFile(built.path) as archive:
        archive.extractall(tmp_path / "there")
    script = (
        "import sys; from importlib import metadata; from pathlib import Path\n"
        "from ray_jobs import config, lineage\n"
        "assert Path(config.__file__).is_relative_to(Path.cwd()), config.__file__\n"
        "import data.ontology\n"
        "assert len(list(config.CONFIGS.glob('*/*.yaml'))) > 5\n"
        "sys.stdout.write(lineage.code_version())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path / "there",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "there")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0.1.0")
    names = _names(built.path)
    assert "run.yaml" in names
    assert {name.split("/")[0] for name in names if not name.startswith("rayfuse-")} == {
        "run.yaml",
        *package.PACKAGES,
    }
    assert built.bytes < 3 * 2**20
    assert f"{len(names)} files" in str(built)


def test_equal_code_makes_an_equal_archive(clone: Path, tmp_path: Path) -> None:
    one = package.build(tmp_path / "a.zip", {"run.yaml": "a"}, root=clone)
    os.utime(clone / "data" / "__init__.py", (1, 1))
    two = package.build(tmp_path / "b.zip", {"run.yaml": "a"}, root=clone)
    assert one.path.read_bytes() == two.path.read_bytes()


def test_only_the_known_open_tables_and_the_tiny_model_are_exempt() -> None:
    folders = ("data/resources", "fusion/encoders/tiny_llama")
    found = {f"{folder}/{path.name}" for folder in folders for path in (ROOT / folder).iterdir()}
    assert {name for name in found if not name.endswith(package.CODE)} == set(package.RESOURCES)


@pytest.mark.parametrize(
    "name",
    [
        "data/admissions.csv",
        "data/resources/patients.csv.gz",
        "data/shards/part-00000.parquet",
        "fusion/best.safetensors",
        "fusion/model.pt",
        "fusion/weights.bin",
        "data/chest.jpg",
        "data/demo/chest.dcm",
        "data/cache.arrow",
        "ray_jobs/.env",
        "ray_jobs/head.pem",
        "ray_jobs/auth_token",
        "ray_jobs/credentials.yaml",
    ],
)
def test_data_and_secrets_are_refused_by_name(clone: Path, tmp_path: Path, name: str) -> None:
    (clone / name).parent.mkdir(parents=True, exist_ok=True)
    (clone / name).write_bytes(b"x")
    with pytest.raises(InputError, match=f"never uploaded: {name};"):
        package.build(tmp_path / "a.zip", {}, root=clone)
    assert not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (KEY, "a private key"),
        ("key = 'AKIA" + "ABCDEFGHIJKLMNOP'", "an AWS key"),
        ("token: hf_" + "a" * 34, "a Hugging Face token"),
        ("token = 0123456789abcdef", "the cluster's token"),
    ],
)
def test_secrets_are_refused_by_content(clone: Path, tmp_path: Path, text: str, kind: str) -> None:
    (clone / "ray_jobs" / "settings.py").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"ray_jobs/settings.py holds {kind}"):
        package.build(tmp_path / "a.zip", {}, root=clone, secret="0123456789abcdef")
    assert not (tmp_path / "a.zip").exists()


def test_a_link_is_refused(clone: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("of a patient", encoding="utf-8")
    (clone / "data" / "notes.txt").symlink_to(tmp_path / "notes.txt")
    with pytest.raises(InputError, match=r"data/notes\.txt"):
        package.build(tmp_path / "a.zip", {}, root=clone)


def test_what_git_ignores_is_refused(clone: Path, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(clone)], check=True)
    (clone / ".gitignore").write_text("*_private.py\n", encoding="utf-8")
    (clone / "data" / "cohort_private.py").write_text("", encoding="utf-8")
    (clone / "fusion" / "new_model.py").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"1 files .* data/cohort_private\.py"):
        package.build(tmp_path / "a.zip", {}, root=clone)
    (clone / "data" / "cohort_private.py").unlink()
    built = package.build(tmp_path / "a.zip", {}, root=clone)
    assert "fusion/new_model.py" in _names(built.path), "not committed yet, but code"


def test_above_the_upload_limit_the_largest_are_named(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert package.upload_limit() == 512 * 2**20
    monkeypatch.setattr(package, "upload_limit", lambda: 50_000)
    (clone / "fusion" / "table.py").write_bytes(os.urandom(80_000).hex().encode())
    (clone / "data" / "small.py").write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"0\.1 MiB zipped.*package: fusion/table\.py \(0"):
        package.build(tmp_path / "a.zip", {}, root=clone)
    assert not (tmp_path / "a.zip").exists()


def test_with_an_installed_wheel_only_the_run_is_sent(tmp_path: Path) -> None:
    built = package.build(tmp_path / "a.zip", {"run.yaml": "name: x\n"}, code=False)
    assert _names(built.path) == {"run.yaml"}
