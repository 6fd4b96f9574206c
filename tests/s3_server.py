"""An S3-compatible server in this process (moto's), which logs and fails as ``web_server.WebServer`` does.

    def test_a_merge_goes_on_after_a_reset(s3_server: S3Server) -> None:    # fixture in remote_fixtures.py
        s3_server.put("model/a.safetensors", data)                          # or s3_server.put_folder("model", path)
        s3_server.fail("reset", "model/*.safetensors")
        ... read f"{s3_server.url}/model" ...                               # s3://bucket/NAME-OF-THE-TEST/model
        assert s3_server.reads_of("model/a.safetensors") == [(0, 100)]
        assert s3_server.names() == ["model/a.safetensors"]                 # as boto3 sees them
        assert s3_server.uploads() == []                                    # multipart uploads that are not complete

Names are relative to ``url``. The environment has the endpoint and credentials; other processes take them from there.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from web_server import Answer, WebServer, serving

BUCKET = "bucket"
SECRET = "alnicos-secret-key"
"""Must be in no message."""


class S3Server(WebServer):
    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        super().__init__(Path("nowhere"))
        self.app = DomainDispatcherApplication(create_backend_app)
        self.prefix = ""
        """Of the keys of a test, with a slash at the end."""
        self._client: Any = None

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}/{self.prefix.rstrip('/')}"

    @url.setter
    def url(self, value: str) -> None:
        pass

    @property
    def client(self) -> Any:
        """boto3's client."""
        if self._client is None:
            import boto3

            self._client = boto3.client(
                "s3", endpoint_url=self.endpoint, aws_access_key_id="key", aws_secret_access_key=SECRET, region_name="us-east-1"
            )  # fmt: skip
        return self._client

    def put(self, name: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=self.prefix + name, Body=data)

    def put_folder(self, name: str, folder: Path) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def read(self, name: str) -> bytes:
        body: bytes = self.client.get_object(Bucket=BUCKET, Key=self.prefix + name)["Body"].read()
        return body

    def names(self, folder: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=BUCKET, Prefix=self.prefix + folder
        )
        return sorted(o["Key"].removeprefix(self.prefix) for page in pages for o in page.get("Contents", []))

    def uploads(self) -> list[str]:
        found = self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        return sorted(u["Key"].removeprefix(self.prefix) for u in found if u["Key"].startswith(self.prefix))

    def name_of(self, path: str) -> str:
        return path.removeprefix(f"{BUCKET}/").removeprefix(self.prefix)

    def respond(self, request: Any, path: str) -> Answer:
        from werkzeug.test import run_wsgi_app

        headers, url = request.headers, urlsplit(request.path)
        body = request.rfile.read(int(headers.get("Content-Length", 0)))
        environ = {
            "REQUEST_METHOD": request.command, "SCRIPT_NAME": "", "PATH_INFO": f"/{path}".encode().decode("latin-1"),
            "QUERY_STRING": url.query, "RAW_URI": request.path, "REQUEST_URI": request.path,
            "SERVER_NAME": "127.0.0.1", "SERVER_PORT": str(self.server.server_port), "SERVER_PROTOCOL": "HTTP/1.1",
            "CONTENT_TYPE": headers.get("Content-Type", ""), "CONTENT_LENGTH": str(len(body)),
            "wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(body), "wsgi.errors": io.StringIO(),
            "wsgi.multithread": True, "wsgi.multiprocess": False, "wsgi.run_once": False,
        }  # fmt: skip
        environ |= {f"HTTP_{key.upper().replace('-', '_')}": value for key, value in headers.items()}
        try:
            parts, status, found = run_wsgi_app(self.app, environ, buffered=True)
        except KeyError:  # moto 5.2 has no answer to the completion of an upload that is not there
            return self.refuse(404, "NoSuchUpload")
        # Without the length: some answers to HEAD state one of no body.
        kept = {
            key: value for key, value in found.items() if key.lower() not in ("connection", "date", "server")
        }
        data = b"".join(parts)
        if request.command != "HEAD":
            kept = {key: value for key, value in kept.items() if key.lower() != "content-length"}
        return Answer(int(str(status).split()[0]), data, {_spelt(key): value for key, value in kept.items()})

    def refuse(self, status: int, code: str) -> Answer:
        text = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{code} it is.</Message></Error>"
        return Answer(status, text.encode(), {"Content-Type": "application/xml"})


def _spelt(key: str) -> str:
    return {"etag": "ETag"}.get(key.lower(), "-".join(word.capitalize() for word in key.split("-")))


@contextmanager
def serving_s3() -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch:
        set_aws(patch, "http://127.0.0.1:9")  # moto's backends read the environment when they are made
        server = S3Server()
        with serving(server):
            server.client.create_bucket(Bucket=BUCKET)
            yield server


def set_aws(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Settings of AWS's libraries for a server, and none of the user's."""
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/nowhere", "AWS_SHARED_CREDENTIALS_FILE": "/nowhere", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        patch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        patch.delenv(name, raising=False)
