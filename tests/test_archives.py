"""The download of IMDb: verified, or given up in one line that says what to do, whatever the server does."""

import dataclasses
import gzip
import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from test_imdb import contents, expected_contents, members, small_and_offline, tar_bytes

from data_pipeline import DataSettings, DataUnavailableError, load_task, main
from tasks import archives, imdb
from tasks.imdb import load_reviews

__all__ = ["small_and_offline"]  # a fixture for every test here


class Server(BaseHTTPRequestHandler):
    """Serves `content`, of which `announced` bytes are promised."""

    content: ClassVar[bytes] = b""
    announced: ClassVar[int | None] = None
    status: ClassVar[int] = 200
    asked: ClassVar[int] = 0

    def do_GET(self) -> None:
        Server.asked += 1
        self.send_response(self.status)
        self.send_header(
            "Content-Length", str(len(self.content) if self.announced is None else self.announced)
        )
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    content = gzip.compress(tar_bytes(members()), compresslevel=1, mtime=0)
    Server.content, Server.announced, Server.status, Server.asked = content, None, 200, 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        url = f"http://127.0.0.1:{running.server_port}/aclImdb_v1.tar.gz"
        served = dataclasses.replace(imdb.OFFICIAL, url=url, sha256=hashlib.sha256(content).hexdigest())
        monkeypatch.setattr(imdb, "OFFICIAL", served)
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Server
        running.shutdown()
        thread.join()


def test_what_is_nowhere_is_downloaded_once(server: type[Server], tmp_path: Path) -> None:
    for _ in range(2):
        reviews = load_reviews(None, tmp_path / "cache")
        assert contents(reviews) == expected_contents() and reviews.official
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert names[0] == "aclImdb_v1.tar.gz" and len(names) == 2
    (tmp_path / "cache" / "aclImdb_v1.tar.gz").unlink()  # what was read of it is enough
    assert contents(load_reviews(None, tmp_path / "cache")) == expected_contents()
    assert server.asked == 1


def test_the_command_downloads_into_the_folder_that_it_is_given(server: type[Server], tmp_path: Path) -> None:
    assert main(["imdb", "--data-dir", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "aclImdb_v1.tar.gz").read_bytes() == server.content


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("cut", "invalid hash value"),
        ("wrong bytes", "invalid hash value"),
        ("HTML", "invalid hash value"),
        ("empty", "invalid hash value"),
        ("404", "404"),
        ("503", "503"),
    ],
)
def test_a_download_that_is_not_the_archive_leaves_nothing_and_names_the_command_to_run(
    fault: str, words: str, server: type[Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = server.content
    server.content = {
        "cut": content[:100],
        "wrong bytes": content[:-1] + b"x",
        "HTML": b"<html>Log in to use this network</html>",
        "empty": b"",
    }.get(fault, content)
    server.announced = len(content) if fault == "cut" else None
    server.status = int(fault) if fault.isdecimal() else 200
    assert main(["imdb", "--data-dir", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    target = tmp_path / "new" / "aclImdb_v1.tar.gz"
    assert (
        words in error and f"get it by: curl -L --create-dirs --output {target} {imdb.OFFICIAL.url}" in error
    )
    assert not (tmp_path / "new").exists()


def test_without_a_network_the_command_to_run_is_named_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(DataUnavailableError) as caught:
        load_task("imdb", DataSettings(cache_dir=str(tmp_path / "my cache")))
    target = tmp_path / "my cache" / "aclImdb_v1.tar.gz"
    assert f"curl -L --create-dirs --output '{target}' {imdb.OFFICIAL.url}" in str(caught.value)
    assert "--data-dir" in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert time.monotonic() - started < 3


def test_a_server_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "TIMEOUT", 0.2)
    before = socket.getdefaulttimeout()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/aclImdb_v1.tar.gz"
        monkeypatch.setattr(imdb, "OFFICIAL", dataclasses.replace(imdb.OFFICIAL, url=url))
        with pytest.raises(DataUnavailableError, match="timed out"):
            load_reviews(None, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert socket.getdefaulttimeout() == before


def test_a_folder_that_cannot_be_written_is_data_that_are_unavailable(
    server: type[Server], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataUnavailableError):
        load_reviews(None, tmp_path / "file" / "cache")
    assert server.asked == 0
