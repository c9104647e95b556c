"""An S3 server in this process, and a store in memory that remembers what was done to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.errors import InputError

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_DEFAULT_REGION": "us-east-1",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}


class Memory:
    """A Store. `log` holds ("put", name, bytes) and ("remove", name); puts fail after `puts`."""

    uri = "memory://run"

    def __init__(self, objects=None, puts=None):
        self.objects = dict(objects or {})
        self.log = []
        self.puts = puts

    def put(self, source, name):
        if self.puts == 0:
            raise InputError("storage_path: the network is gone")
        if self.puts is not None:
            self.puts -= 1
        self.objects[name] = Path(source).read_bytes()
        self.log.append(("put", name, self.objects[name]))

    def get(self, name, target):
        if name not in self.objects:
            raise FileNotFoundError(2, "no such object", name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.objects[name])

    def names(self, prefix=""):
        return {name: len(data) for name, data in self.objects.items() if name.startswith(prefix)}

    def remove(self, name):
        below = name.endswith("/")
        for one in list(self.objects):
            if one == name or (below and one.startswith(name)):
                del self.objects[one]
        self.log.append(("remove", name))

    def after(self, count):
        """The store as it was after the first `count` calls."""
        past = Memory()
        for what, name, *data in self.log[:count]:
            if what == "put":
                past.objects[name] = data[0]
            else:
                past.remove(name)
        return past


@pytest.fixture
def memory():
    """A Store in memory."""
    return Memory()


@pytest.fixture(scope="session")
def s3_port():
    """The port of an S3 server whose buckets are moto's own, in this process."""
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as environment:
        for name, value in CREDENTIALS.items():
            environment.setenv(name, value)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        yield server.get_host_and_port()[1]
        server.stop()


@pytest.fixture
def s3(s3_port):
    """`s3(bucket, make=True, prefix="")`: a storage path there, the bucket made first."""
    import boto3

    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3_port}")

    def path(bucket, *, make=True, prefix="runs"):
        if make:
            client.create_bucket(Bucket=bucket)
        query = f"scheme=http&endpoint_override=127.0.0.1:{s3_port}&region=us-east-1"
        return f"s3://{bucket}/{prefix}?{query}"

    path.client = client
    return path
