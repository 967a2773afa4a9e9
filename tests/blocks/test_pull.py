"""Fetching a model from a hub: one of our own, on this machine, that speaks as much of its protocol as is needed."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint

COMMIT = "5" * 40


class Hub(BaseHTTPRequestHandler):
    """`/{organisation}/{name}/resolve/{revision}/{file}`, with the checksums that the real one sends."""

    folder: Path

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        if content := self._answer():
            self.wfile.write(content)

    def _answer(self) -> bytes:
        _, organisation, name, resolve, _, file = self.path.partition("?")[0].split("/")
        path = self.folder / file
        if (organisation, name, resolve) != ("people", "tiny", "resolve") or not path.exists():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if name == "tiny" else "RepoNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return b""
        content = path.read_bytes()
        large = path.suffix == ".safetensors"
        etag = hashlib.sha256(content) if large else hashlib.sha1(b"blob %d\0" % len(content) + content)
        self.send_response(200)
        self.send_header("ETag", f'"{etag.hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return content

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """Its address."""
    make_checkpoint(tmp_path / "published", "llama")
    handler = type("Published", (Hub,), {"folder": tmp_path / "published"})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def pull(hub: str, cache: Path, name: str = "people/tiny") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-m", "llmasos.cli", "models", "--pull", name, "--json"],
        capture_output=True,
        text=True,
        env=environment,
    )


def test_a_model_is_fetched_whole_and_checked(hub: str, tmp_path: Path) -> None:
    done = pull(hub, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    folder = Path(told["path"])
    published = tmp_path / "published"
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (published / name).read_bytes()
    assert told["files"] == len(list(folder.iterdir()))
    assert told["size_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert "checksums are right" in done.stderr


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_was_damaged_is_named_with_what_to_do(name: str, hub: str, tmp_path: Path) -> None:
    folder = Path(json.loads(pull(hub, tmp_path / "cache").stdout)["path"])
    blob = (folder / name).resolve()
    content = bytearray(blob.read_bytes())
    content[-3] ^= 1 if name == "model.safetensors" else 0
    blob.write_bytes(content + (b" " if name == "config.json" else b""))
    done = pull(hub, tmp_path / "cache")
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"{name} is damaged" in done.stderr
    assert f"rm {blob}" in done.stderr


def test_a_model_that_nobody_published(hub: str, tmp_path: Path) -> None:
    done = pull(hub, tmp_path / "cache", "people/huge")
    assert (done.returncode, done.stdout) == (1, "")
    assert "people/huge" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_embedded_model_is_here_and_whole(tmp_path: Path) -> None:
    from llmasos.blocks.pull import pull as pull_here

    pulled = pull_here("smollm2", lambda done, total: None)
    assert pulled.path.suffix == ".gguf"
    assert pulled.size_bytes == pulled.path.stat().st_size
