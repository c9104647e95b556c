"""The working directory of a submitted job: this package's code and the run's YAML, nothing else.

Whether rayfuse is imported from a clone or from an installed wheel, the three packages are taken
from where they were imported, so that the nodes need the dependencies only and run the very code
that submitted.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PACKAGES = ("data", "fusion", "ray_jobs")
CODE = (".py", ".yaml", ".yml", ".j2", ".css", ".md", ".sbatch", ".txt")
# Open tables that the package ships, with their licences, and a language model without weights for
# tests and benchmarks; a job needs them.
RESOURCES = (
    "data/resources/ccs_2015_icd9.csv.gz",
    "data/resources/gem_2018_icd10_to_icd9.csv.gz",
    "data/resources/gem_2018_icd9_to_icd10.csv.gz",
    "data/resources/items.csv",
    "fusion/encoders/tiny_llama/config.json",
    "fusion/encoders/tiny_llama/tokenizer.json",
    "fusion/encoders/tiny_llama/tokenizer_config.json",
)
# Left out: caches, and the open demo patients, whom no job on a cluster reads.
SKIPPED = ("*/__pycache__/*", "*.py[co]", "data/demo/mimic-*/*")
SECRET_NAMES = (
    ".env*",
    "*.env",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "id_rsa*",
    "id_ed25519*",
    "id_ecdsa*",
    "*auth_token*",
    "credentials*",
    ".netrc",
    ".pypirc",
    "kubeconfig*",
)
_SECRETS = {
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "an AWS key": re.compile(rb"\bAKIA[0-9A-Z]{16}\b"),
    "a Hugging Face token": re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b"),
    "a GitHub token": re.compile(rb"\bgh[pousr]_[A-Za-z0-9]{36,}\b"),
    "a Weights & Biases key": re.compile(rb"WANDB_API_KEY\s*[=:]\s*['\"]?[0-9a-f]{40}"),
}
_LISTED = 8
# One moment for every entry: equal content makes an equal archive, which Ray uploads once.
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Package:
    """An archive for Ray's `working_dir`."""

    path: Path
    files: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.files} files, {self.bytes / 2**20:.1f} MiB zipped"


def code_root() -> Path:
    """Folder that holds the three packages: a clone, or a virtual environment's site-packages."""
    return Path(__file__).parents[1]


def code_digest() -> str:
    """Twelve digits that are equal where this package's code is."""
    root = code_root()
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def build(
    target: Path,
    texts: Mapping[str, str],
    *,
    root: Path | None = None,
    code: bool = True,
    secret: str = "",
) -> Package:
    """Write the archive.

    Args:
        target: The .zip to write.
        texts: Further files by their name in it, e.g. the run's YAML.
        root: Where the packages are; default: where this one was imported from.
        code: Take the packages; without, the nodes run the wheel that they have installed.
        secret: The cluster's token, which no file may hold.

    Raises:
        InputError: A file is data, is ignored by git, or holds a secret; or the archive is larger
            than Ray takes.
    """
    root = root or code_root()
    contents = {name: text.encode() for name, text in texts.items()}
    if code:
        chosen = _chosen(root)
        contents |= {name: (root / name).read_bytes() for name in chosen}
        contents |= _distribution()
    _refuse_secrets(contents, secret)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name in sorted(contents):
            entry = zipfile.ZipInfo(name, date_time=_EPOCH)
            entry.external_attr = 0o600 << 16
            archive.writestr(entry, contents[name], compress_type=zipfile.ZIP_DEFLATED)
    _refuse_too_large(target)
    return Package(target, len(contents), target.stat().st_size)


def _chosen(root: Path) -> list[str]:
    """The packages' files, by their names below `root`."""
    found = [
        path
        for package in PACKAGES
        for path in sorted((root / package).rglob("*"))
        if path.is_symlink() or path.is_file()
    ]
    names = [path.relative_to(root).as_posix() for path in found]
    names = [name for name in names if not any(fnmatch(name, skip) for skip in SKIPPED)]
    ignored = _ignored_by_git(root)
    refused = [
        name
        for name in names
        if name in ignored
        or (root / name).is_symlink()
        or _is_secret(name)
        or not (name.endswith(CODE) or name in RESOURCES)
    ]
    if refused:
        raise InputError(
            f"{len(refused)} files in {root} are not code and are never uploaded: "
            f"{_some(refused)}; move data, weights and secrets out of {', '.join(PACKAGES)}"
        )
    return names


def _ignored_by_git(root: Path) -> set[str]:
    if not (root / ".git").exists():
        return set()
    command = ["git", "-C", str(root), "ls-files", "-z", "--others", "--ignored"]
    command += ["--exclude-standard", "--", *PACKAGES]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(
            f"{root}: git cannot say which files are ignored ({error}); install git, or submit "
            "from an installed wheel"
        ) from None
    return set(done.stdout.split("\0")) - {""}


def _is_secret(name: str) -> bool:
    return any(fnmatch(Path(name).name, pattern) for pattern in SECRET_NAMES)


def _refuse_secrets(contents: Mapping[str, bytes], token: str) -> None:
    for name, content in contents.items():
        found = [kind for kind, pattern in _SECRETS.items() if pattern.search(content)]
        if token and token.encode() in content:
            found.append("the cluster's token")
        if found:
            raise InputError(f"{name} holds {found[0]}: take it out, secrets are never uploaded")


def _refuse_too_large(archive: Path) -> None:
    limit, size = upload_limit(), archive.stat().st_size
    if size < limit:
        return
    with zipfile.ZipFile(archive) as opened:
        entries = sorted(opened.infolist(), key=lambda entry: -entry.compress_size)
    largest = [f"{entry.filename} ({entry.compress_size / 2**20:.1f} MiB)" for entry in entries]
    archive.unlink()
    raise InputError(
        f"the working directory is {size / 2**20:.1f} MiB zipped, but Ray takes less than "
        f"{limit / 2**20:.1f} MiB; move the largest out of the package: {_some(largest)}"
    )


def upload_limit() -> int:
    """Bytes that Ray's upload of a working directory stays below."""
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE

    return int(GCS_STORAGE_MAX_SIZE)


def _distribution() -> dict[str, bytes]:
    """Metadata by which the uploaded packages know their version, as an installed wheel's do."""
    from ray_jobs.lineage import code_version

    version, described = metadata.version("rayfuse"), code_version()
    if described != version:
        version += "+" + ".".join(re.findall("[A-Za-z0-9]+", described))
    text = f"Metadata-Version: 2.1\nName: rayfuse\nVersion: {version}\n"
    return {f"rayfuse-{version}.dist-info/METADATA": text.encode()}


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more
