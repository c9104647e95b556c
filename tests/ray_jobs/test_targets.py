"""What is written for Kubernetes and Slurm: sizes from `scaling`, a token, paths on the storage."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import typer.main
import yaml

from data.errors import InputError
from ray_jobs import config as run_config
from ray_jobs import submit, targets
from ray_jobs.cli import app

STORAGE = Path("/mnt/rayfuse")
KUBERNETES = targets.Kubernetes(image="registry.example/rayfuse:0.1", claim="shared")


def _command(tmp_path: Path, *overrides: str, storage: Path = STORAGE) -> submit.Command:
    document = {
        "name": "Big_Run.v2",
        "task": "mortality",
        "model": {"name": "lstm"},
        "data": {"shards": "shards/it's here", "batches": {"processes": 3}},
        "scaling": {"num_workers": 12, "use_gpu": True},
    }
    path = tmp_path / "big.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    root = typer.main.get_command(app)
    return submit.prepare(root, ["train", str(path), "--fork", *overrides], storage)


@pytest.mark.parametrize(
    ("overrides", "per_node", "expected"),
    [
        ([], None, targets.Layout(2, 2, cpus=24, gpus=6)),
        ([], 4, targets.Layout(3, 3, cpus=16, gpus=4)),
        (["scaling.num_workers=[4,16]"], 8, targets.Layout(1, 2, cpus=32, gpus=8)),
        (["scaling.num_workers=1"], None, targets.Layout(1, 1, cpus=4, gpus=1)),
        (["scaling.use_gpu=false"], 6, targets.Layout(2, 2, cpus=24, gpus=0)),
        (
            ["scaling.resources_per_worker={CPU: 7, GPU: 2}", "scaling.num_workers=4"],
            4,
            targets.Layout(1, 1, cpus=28, gpus=8),
        ),
    ],
)
def test_sizes_come_from_scaling(
    tmp_path: Path, overrides: list[str], per_node: int | None, expected: targets.Layout
) -> None:
    assert targets.layout(_command(tmp_path, *overrides).runs, per_node) == expected


def test_a_rayjob_holds_the_run_and_the_cluster(tmp_path: Path) -> None:
    command = _command(tmp_path)
    text = targets.kubernetes(command, KUBERNETES)
    config_map, job = yaml.safe_load_all(text)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    name = job["metadata"]["name"]
    assert name == config_map["metadata"]["name"] == "rayfuse-big-run-v2"
    (tmp_path / "sent.yaml").write_text(config_map["data"]["run.yaml"], encoding="utf-8")
    assert run_config.load(tmp_path / "sent.yaml") == list(command.runs)
    spec = job["spec"]
    assert spec["entrypoint"] == "exec python -m ray_jobs train /etc/rayfuse/run.yaml --fork"
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_SIGNAL"] == "SIGTERM"
    assert spec["backoffLimit"] == 3
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "rayfuse-token"}
    (workers,) = cluster["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["replicas"], workers["maxReplicas"]) == (2, 2, 2)
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "24", "memory": "64Gi", "nvidia.com/gpu": "6"}
    for group in (cluster["headGroupSpec"], workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        _check_pod(group["template"]["spec"])
    mounted = {mount["name"] for mount in _container(cluster["headGroupSpec"])["volumeMounts"]}
    assert "run" in mounted, "the driver, on the head, reads the run's YAML"


def _container(group: dict) -> dict:
    return group["template"]["spec"]["containers"][0]


def _check_pod(pod: dict) -> None:
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert set(volumes) == set(mounts)
    assert volumes["storage"]["persistentVolumeClaim"] == {"claimName": "shared"}
    assert mounts["storage"]["mountPath"] == "/mnt/rayfuse"
    assert volumes["token"]["secret"] == {"secretName": "rayfuse-token", "defaultMode": 0o440}
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == f"{mounts['token']['mountPath']}/auth_token"
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsUser"] == 1000


def test_paths_off_the_claim_are_refused_by_key(tmp_path: Path) -> None:
    command = _command(tmp_path, "data.shards=/local/shards")
    with pytest.raises(InputError, match=r"data\.shards: /local/shards is not on the shared"):
        targets.kubernetes(command, KUBERNETES)


def test_a_command_without_a_run_has_no_size() -> None:
    command = submit.Command(("report", "/mnt/rayfuse/runs/x"), (), {})
    with pytest.raises(InputError, match="without --target"):
        targets.slurm(command, targets.Slurm())


def _script(tmp_path: Path, *overrides: str, **options: object) -> Path:
    path = tmp_path / "run.sbatch"
    made = targets.slurm(_command(tmp_path, *overrides), targets.Slurm.model_validate(options))
    path.write_text(made, encoding="utf-8")
    return path


def test_an_sbatch_script_asks_for_what_the_run_needs(tmp_path: Path) -> None:
    path = _script(tmp_path, time="12:00:00", warn_s=120, partition="gpu", setup="module load x")
    lines = path.read_text().splitlines()
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert {"nodes=2", "ntasks-per-node=1", "cpus-per-task=24", "gpus-per-node=6"} <= asked
    assert {"time=12:00:00", "partition=gpu", "requeue", "exclusive"} <= asked
    assert {"signal=B:USR1@120", "open-mode=append"} <= asked
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    assert not any("#SBATCH" in line for line in lines[first:]), "Slurm reads none after a command"
    assert "module load x" in lines


def test_an_elastic_run_takes_the_nodes_there_are(tmp_path: Path) -> None:
    path = _script(tmp_path, "scaling.num_workers=[4,16]", per_node=4)
    assert "#SBATCH --nodes=1-4" in path.read_text().splitlines()


def test_the_script_is_sound_bash(tmp_path: Path) -> None:
    path = _script(tmp_path)
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here; bash -n passed")
    subprocess.run(["shellcheck", str(path)], check=True)


def test_written_or_only_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = _command(tmp_path)
    printed = submit.write_target(command, "slurm", ["time=1-00:00:00"], dry_run=True)
    assert not list(tmp_path.glob("*.sbatch"))
    told = submit.write_target(command, "slurm", ["time=1-00:00:00"], dry_run=False)
    assert told == "wrote Big_Run.v2.sbatch; send it with `sbatch Big_Run.v2.sbatch`"
    assert (tmp_path / "Big_Run.v2.sbatch").read_text() == printed
    with pytest.raises(InputError, match="-o:\n  timee: unknown key; did you mean 'time'"):
        submit.write_target(command, "slurm", ["timee=3"], dry_run=True)
    with pytest.raises(InputError, match="image: required, but missing"):
        submit.write_target(command, "kuberay", ["claim=shared"], dry_run=True)
