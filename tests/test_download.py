"""`hf:` sources from a local hub: broken connections, incomplete files, missing repositories."""

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

from beagle_jax.errors import run_main
from beagle_jax.weights import hf

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": save({"x": np.arange(300_000, dtype=np.float32)}),
    "consolidated.safetensors": b"the same weights as their maker stores them",
    "pytorch_model.bin": b"a pickle",
}


class Hub(BaseHTTPRequestHandler):
    """Serves a snapshot of one public repository as the Hugging Face hub does."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.requests[path] += 1
        name = path.removeprefix(f"/org/name/resolve/{COMMIT}/")
        if path.startswith("/api/models/org/name/revision/"):
            return self.answer(
                json.dumps(
                    {
                        "id": "org/name",
                        "sha": COMMIT,
                        "siblings": [{"rfilename": name} for name in FILES],
                    }
                ).encode()
            )
        if path.startswith("/api/models/org/name/tree/"):
            return self.answer(
                json.dumps(
                    [
                        {
                            "type": "file",
                            "path": name,
                            "size": len(content),
                            "oid": hashlib.sha1(content).hexdigest(),
                        }
                        for name, content in FILES.items()
                    ]
                ).encode()
            )
        if name in FILES:
            return self.answer(
                FILES[name],
                {"ETag": f'"{hashlib.sha1(FILES[name]).hexdigest()}"', "X-Repo-Commit": COMMIT},
            )
        self.answer(
            b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, status=404
        )

    def answer(self, content: bytes, headers: dict[str, str] | None = None, status: int = 200):
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        end = self.server.breaks(self.path.rpartition("/")[2], start, len(content))
        self.server.sent.append((self.path.rpartition("/")[2], start, end))
        self.wfile.write(content[start:end])
        if end < len(content):
            self.wfile.flush()
            self.connection.shutdown(2)
            self.close_connection = True


@pytest.fixture
def hub(monkeypatch):
    """A running hub.

    `breaks(file, start, size)` is the byte at which an answer from byte `start` on breaks off.
    """
    server = ThreadingHTTPServer(("localhost", 0), Hub)
    server.requests, server.sent, server.breaks = Counter(), [], lambda name, start, size: size
    url = f"http://localhost:{server.server_port}"
    # The chunk is what is written at once: 10 MB of a real file.
    settings = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": True,
        "HF_HUB_DOWNLOAD_TIMEOUT": 5,
        "DOWNLOAD_CHUNK_SIZE": 1 << 16,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between two attempts
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def download(hub, tmp_path, capsys):
    def download(repo: str = "org/name") -> tuple[int, str, str]:
        """Returns exit status, stdout and stderr."""
        status = run_main(lambda argv: print(hf.download(argv[0], tmp_path)), [repo])
        return status, *capsys.readouterr()

    return download


def test_what_a_target_needs_and_nothing_else(download):
    status, printed, errors = download()
    assert status == 0, errors
    folder = Path(printed.strip())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (
        folder.name == COMMIT
        and (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    )


def test_a_broken_connection_is_gone_on_with_where_it_broke(hub, download):
    half = len(FILES["model.safetensors"]) // 2
    hub.breaks = lambda name, start, size: (
        half if name == "model.safetensors" and start == 0 else size
    )
    status, printed, errors = download()
    assert status == 0, errors
    assert (Path(printed.strip()) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    first, second = [(start, end) for name, start, end in hub.sent if name == "model.safetensors"]
    assert (
        first == (0, half)
        and 0 < half - second[0] < 1 << 16
        and second[1] == len(FILES["model.safetensors"])
    )


def test_a_connection_that_never_holds_is_one_message_and_the_next_run_goes_on(
    hub, download, tmp_path
):
    hub.breaks = lambda name, start, size: start if name == "model.safetensors" else size
    status, printed, errors = download()
    assert status == 1 and "Traceback" not in errors and printed == ""
    assert "error: target.source: hf:org/name could not be downloaded (" in errors
    assert (
        "check the name and the network, then run again (complete files are not downloaded again)"
        in errors
    )
    assert not list(tmp_path.rglob("snapshots/*/model.safetensors"))
    hub.breaks = lambda name, start, size: size
    hub.sent.clear()
    assert download()[0] == 0
    assert [name for name, *_ in hub.sent if name in FILES] == ["model.safetensors"]


def test_a_repository_that_is_not_there(download):
    status, _, errors = download("org/other@v1")
    assert status == 1 and "Traceback" not in errors
    assert "error: target.source: hf:org/other@v1 could not be downloaded (" in errors
