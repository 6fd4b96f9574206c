"""The servers that other tests of this folder ask: they serve, count and fail as they say."""

from __future__ import annotations

import http.client
import math
from urllib.parse import urlsplit

import botocore.exceptions
import pytest

from s3_server import BUCKET, S3Server
from web_server import WebServer


def get(url: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=5)
    try:
        connection.request("GET", parts.path, headers={k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        return response.status, response.read(), dict(response.getheaders())
    finally:
        connection.close()


def test_the_web_server_counts_ranges(web_server: WebServer) -> None:
    (web_server.folder / "a").write_bytes(bytes(range(100)))
    url = f"{web_server.url}/a"
    status, body, headers = get(url, Range="bytes=10-19")
    assert (status, body, headers["Content-Range"]) == (206, bytes(range(10, 20)), "bytes 10-19/100")
    assert get(url, If_Match=headers["ETag"], Range="bytes=0-0")[0] == 206
    assert get(url, If_Match='"other"')[0] == 412
    assert get(url, Range="bytes=100-")[0] == 416
    assert web_server.reads_of("a") == [(0, 1), (10, 10)]


def test_the_web_server_fails_as_it_is_told(web_server: WebServer) -> None:
    (web_server.folder / "a").write_bytes(bytes(100))
    url = f"{web_server.url}/a"
    web_server.fail("status", status=503, headers={"Retry-After": "1"}, times=2)
    assert [get(url)[0] for _ in range(3)] == [503, 503, 200]
    web_server.fail("whole", skip=1)
    assert [get(url, Range="bytes=0-9")[0] for _ in range(2)] == [206, 200]
    web_server.fail("reset")
    with pytest.raises(OSError):
        get(url)
    web_server.fail("cut")
    with pytest.raises(http.client.IncompleteRead):
        get(url)
    web_server.fail("wrong range")
    assert get(url, Range="bytes=0-9")[2]["Content-Range"] == "bytes 1-10/100"
    web_server.fail("redirect")
    assert get(url)[2]["Location"] == "/a"
    assert web_server.failures == ["status", "status", "whole", "reset", "cut", "wrong range", "redirect"]


def test_the_s3_server_keeps_counts_and_fails(s3_server: S3Server) -> None:
    s3_server.put("m/a", bytes(range(100)))
    key = {"Bucket": BUCKET, "Key": f"{s3_server.prefix}m/a"}
    found = s3_server.client.get_object(**key, Range="bytes=10-19")
    assert found["Body"].read() == bytes(range(10, 20))
    assert s3_server.reads_of("m/a") == [(10, 10)]
    assert s3_server.client.head_object(**key)["ContentLength"] == 100
    assert s3_server.names() == ["m/a"]
    upload = s3_server.client.create_multipart_upload(**key)["UploadId"]
    assert s3_server.uploads() == ["m/a"]
    s3_server.client.abort_multipart_upload(**key, UploadId=upload)
    s3_server.fail("expired", times=math.inf)
    with pytest.raises(botocore.exceptions.ClientError, match="ExpiredToken"):
        s3_server.client.get_object(**key)
