"""An S3 server on loopback (moto's), which looks at signatures and policies once it is told to."""

import contextlib
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import boto3
import pytest
from moto.server import ThreadedMotoServer

POLICY = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}],
}


class S3Server:
    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.key, self.secret = _user(endpoint)

    def bucket(self) -> str:
        """A new one's name."""
        name = f"bucket-{uuid4().hex}"
        self.client().create_bucket(Bucket=name)
        return name

    def client(self) -> "boto3.client":
        return boto3.client(
            "s3", endpoint_url=self.endpoint, region_name="us-east-1",
            aws_access_key_id=self.key, aws_secret_access_key=self.secret,
        )  # fmt: skip

    def objects(self, bucket: str) -> list[str]:
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return [one["Key"] for page in pages for one in page.get("Contents", ())]

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Requests of who isn't known are refused meanwhile."""
        self._look_at_requests("0")
        try:
            yield
        finally:
            self._look_at_requests("inf")

    def _look_at_requests(self, after: str) -> None:
        request = urllib.request.Request(
            f"{self.endpoint}/moto-api/reset-auth",
            after.encode(),
            {"Content-Type": "text/plain"},
            method="POST",
        )
        urllib.request.urlopen(request, timeout=10).close()

    def variables(self, folder: Path) -> dict[str, str]:
        """The environment of a program that uses it, and nothing else of the machine's."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": str(folder / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none"),
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def use(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in self.variables(folder).items():
            patch.setenv(name, value)


def _user(endpoint: str) -> tuple[str, str]:
    """A key of one who may use S3."""
    iam = boto3.client(
        "iam", endpoint_url=endpoint, region_name="us-east-1",
        aws_access_key_id="root", aws_secret_access_key="root",
    )  # fmt: skip
    name = f"service-{uuid4().hex}"  # servers of one process share what they know
    iam.create_user(UserName=name)
    iam.put_user_policy(UserName=name, PolicyName="s3", PolicyDocument=json.dumps(POLICY))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return key["AccessKeyId"], key["SecretAccessKey"]


@contextlib.contextmanager
def an_s3_server() -> Iterator[S3Server]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield S3Server(f"http://{host}:{port}")
    finally:
        server.stop()
