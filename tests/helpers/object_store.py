"""A real S3-compatible server (moto's), in a process of its own."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import boto3
import pytest
import s3fs


@contextlib.contextmanager
def s3_bucket() -> Iterator[str]:
    """URL of an empty bucket; the environment names the server to every S3 client while the context is open."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with pytest.MonkeyPatch.context() as patch, subprocess.Popen(command, **quiet) as server:
        try:
            for name, value in environment.items():
                patch.setenv(name, value)
            for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
                patch.delenv(name)
            _wait(endpoint)
            s3fs.S3FileSystem.clear_instance_cache()  # they remember the server of another test
            boto3.client("s3").create_bucket(Bucket="bucket")
            yield "s3://bucket"
        finally:
            server.kill()


def _wait(endpoint: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(endpoint, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.1)
