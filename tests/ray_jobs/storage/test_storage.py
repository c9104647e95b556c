"""Storage: objects in a real S3 protocol, and every place that must be refused."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from data.errors import InputError
from ray_jobs import doctor, lineage, storage
from ray_jobs.config import RunConfig


def config(**changes):
    value = {
        "name": "one",
        "task": "mortality",
        "model": {"name": "lstm"},
        "data": {"shards": "shards"},
        **changes,
    }
    return RunConfig.model_validate(value)


def test_objects_come_back_as_they_went(s3, tmp_path):
    store = storage.open_store(s3("objects"), "one")
    assert store.uri == "s3://objects/runs/one"
    assert store.names() == {}
    parts = {"a": b"", "deep/er/b": os.urandom(storage._CHUNK + 7), "deep/c": b"first"}
    for name, data in parts.items():
        (tmp_path / "source").write_bytes(data)
        store.put(tmp_path / "source", name)
    (tmp_path / "source").write_bytes(b"second")
    store.put(tmp_path / "source", "deep/c")
    assert store.names() == {"a": 0, "deep/er/b": storage._CHUNK + 7, "deep/c": 6}
    assert set(store.names("deep/er/")) == {"deep/er/b"}
    store.get("deep/er/b", tmp_path / "back" / "b")
    store.get("deep/c", tmp_path / "back" / "c")
    assert (tmp_path / "back" / "b").read_bytes() == parts["deep/er/b"]
    assert (tmp_path / "back" / "c").read_bytes() == b"second"
    with pytest.raises(FileNotFoundError):
        store.get("absent", tmp_path / "absent")
    for name in ("deep/c", "deep/c", "deep/er/", "deep/er/"):
        store.remove(name)
    assert store.names() == {"a": 0}
    store.remove("deep/")
    listed = s3.client.list_objects_v2(Bucket="objects")["Contents"]
    assert not [one for one in listed if "deep" in one["Key"]], "no folder marks pile up"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("s4://bucket/runs", "did you mean s3://"),
        ("file:///runs", "scheme 'file' is not known"),
        ("s3://", "no bucket is named"),
        ("", "empty"),
        ("s3://KEY:hush@bucket/runs", "credentials"),
        ("s3://bucket/runs?secret_key=hush", "credentials"),
    ],
)
def test_a_path_of_another_form_is_refused_with_the_config(path, said):
    with pytest.raises(ValueError, match=said) as refused:
        config(storage_path=path)
    message = refused.value.errors()[0]["msg"]
    assert "storage_path" in message
    assert "hush" not in message


def test_a_folder_takes_the_place_of_runs_dir():
    assert config(runs_dir="here").folder == Path("here/one")
    assert config(runs_dir="here", storage_path="/nfs/runs").folder == Path("/nfs/runs/one")
    in_bucket = config(runs_dir="here", storage_path="s3://b/runs")
    assert in_bucket.folder == Path("here/one")
    assert lineage.differences(config(), in_bucket) == [], "a run may move"


def test_a_missing_bucket_is_named(s3, tmp_path):
    run = config(runs_dir=tmp_path, storage_path=s3("never-made", make=False))
    with pytest.raises(InputError, match="bucket 'never-made' does not exist; create it"):
        storage.check(run)
    assert not list(tmp_path.iterdir())


def test_a_good_bucket_is_left_as_it_was(s3, tmp_path):
    run = config(runs_dir=tmp_path, storage_path=s3("good"))
    storage.check(run)
    assert storage.open_store(run.storage_path, run.name).names() == {}
    assert doctor._storage(run)[0] == "ok"


def test_a_bucket_without_write_permission_is_refused(s3, s3_port, monkeypatch, tmp_path):
    """moto checks credentials and policies once its switch is on: this user may only read."""
    import boto3

    run = config(runs_dir=tmp_path, storage_path=s3("locked"))
    endpoint = f"http://127.0.0.1:{s3_port}"
    iam = boto3.client("iam", endpoint_url=endpoint)
    iam.create_user(UserName="reader")
    allowed = '{"Effect": "Allow", "Action": ["s3:List*", "s3:Get*"], "Resource": "*"}'
    policy = f'{{"Version": "2012-10-17", "Statement": [{allowed}]}}'
    iam.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=policy)
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)
    assert storage.open_store(run.storage_path, "one").names() == {}, "it may read"
    with pytest.raises(InputError, match=r"s3://locked/runs/one/.* is not allowed .*ACCESS_DENIED"):
        storage.check(run)


def test_no_answer_is_tried_again_and_then_named(monkeypatch, tmp_path):
    pauses = []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    # Arrow's own client has waited a few seconds before each of ours.
    monkeypatch.setattr(storage, "TRIES", 2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        query = f"scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"
        store = storage.open_store(f"s3://bucket/runs?{query}", "one")
        (tmp_path / "file").write_text("x")
        with pytest.raises(InputError, match=r"storage_path: writing s3://bucket/runs/one/best"):
            store.put(tmp_path / "file", "best")
    assert pauses == [2.0]


def test_a_failure_that_passes_is_not_told(monkeypatch, s3, tmp_path):
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    store = storage.open_store(s3("flaky"), "one")
    (tmp_path / "file").write_text("x")
    whole, failures = store._files, iter([OSError("AWS Error SLOW_DOWN"), OSError("curlCode: 56")])

    class Flaky:
        def open_output_stream(self, path):
            for failure in failures:
                raise failure
            return whole.open_output_stream(path)

    monkeypatch.setattr(store, "_files", Flaky())
    store.put(tmp_path / "file", "name")
    monkeypatch.setattr(store, "_files", whole)
    assert store.names() == {"name": 1}


def _as_nobody(folder: Path) -> str:
    """What the check says to a user without rights; root may write anywhere."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setuid(65534)
            storage.check_folder(folder, "storage_path")
            os.write(writing, b"nothing")
        except BaseException as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as handle:
        return handle.read()


@pytest.mark.parametrize("key", ["runs_dir", "storage_path"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, key):
    (tmp_path / "file").touch()
    run = config(**{key: str(tmp_path / "file" / "runs")})
    with pytest.raises(InputError, match=f"{key}: .*file/runs cannot be written .Not a directory"):
        storage.check(run)
    assert doctor._storage(run)[0] == "FAIL"


def test_a_folder_without_write_permission_is_refused(tmp_path):
    if os.getuid() == 0:
        said = _as_nobody(tmp_path / "runs")
    else:
        tmp_path.chmod(0o500)
        with pytest.raises(InputError) as refused:
            storage.check_folder(tmp_path / "runs", "storage_path")
        said = str(refused.value)
    assert "storage_path" in said
    assert "Permission denied" in said


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    storage.check(config(storage_path=str(tmp_path / "nfs" / "runs")))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "nfs").mkdir()
    storage.check(config(storage_path=str(tmp_path / "nfs")))
    assert list((tmp_path / "nfs").iterdir()) == []
