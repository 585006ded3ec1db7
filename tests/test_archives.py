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
from typing import Any, ClassVar

import pytest
from run_cases import Refused
from test_imdb import contents, expected_contents, members, small_and_offline, tar_bytes

from command_line import InputError
from data_pipeline import DataSettings, DataUnavailableError, load_task, main
from tasks import archives, cifar_images, imdb
from tasks.imdb import load_reviews

__all__ = ["small_and_offline"]  # a fixture for every test here


class Server(BaseHTTPRequestHandler):
    """Serves `content`, and promises `missing` bytes more."""

    content: ClassVar[bytes]
    missing: ClassVar[int]
    status: ClassVar[int]
    asked: ClassVar[int]

    def do_GET(self) -> None:
        Server.asked += 1
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.content) + self.missing))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def serve_at(port: int, sha256: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{port}/aclImdb_v1.tar.gz"
    monkeypatch.setattr(imdb, "OFFICIAL", dataclasses.replace(imdb.OFFICIAL, url=url, sha256=sha256))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    content = gzip.compress(tar_bytes(members()), compresslevel=1, mtime=0)
    Server.content, Server.missing, Server.status, Server.asked = content, 0, 200, 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        serve_at(running.server_port, hashlib.sha256(content).hexdigest(), monkeypatch)
        thread = threading.Thread(target=running.serve_forever, args=[0.01])
        thread.start()
        yield Server
        running.shutdown()
        thread.join()


def test_what_is_nowhere_is_downloaded_once_and_by_the_command_into_its_folder(
    server: type[Server], tmp_path: Path
) -> None:
    cache, target = tmp_path / "cache", tmp_path / "new" / "aclImdb_v1.tar.gz"
    for _ in range(2):
        reviews = load_reviews(None, cache)
        assert contents(reviews) == expected_contents() and reviews.official
        assert len(list(cache.iterdir())) == 2
    for one_of_two in ("*.npz", target.name):  # what was read of the archive is enough, and so is the archive
        [path] = cache.glob(one_of_two)
        path.unlink()
        assert contents(load_reviews(None, cache)) == expected_contents()
    assert server.asked == 1
    assert main(["imdb", "--data-dir", str(target.parent)]) == 0
    assert target.read_bytes() == server.content


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ((b"the first bytes", 100, 200), "invalid hash value"),
        ((b"", 0, 404), "404"),
    ],
    ids=["cut", "not found"],
)
def test_a_download_that_is_not_the_archive_leaves_nothing_and_names_the_command_to_run(
    reply: tuple[bytes, int, int], words: str, server: type[Server], tmp_path: Path, refused: Refused
) -> None:
    server.content, server.missing, server.status = reply
    said = refused(main, "imdb", "--data-dir", tmp_path / "new")
    target = tmp_path / "new" / "aclImdb_v1.tar.gz"
    assert words in said
    assert f"get it by: curl -L --create-dirs --output {target} {imdb.OFFICIAL.url}" in said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("task", "title", "source"),
    [("bytes", "IMDb", imdb), ("image", "CIFAR-10", cifar_images)],
)
def test_without_a_network_the_command_to_run_is_named_at_once_and_a_wrong_folder_is_another_error(
    task: str, title: str, source: Any, tmp_path: Path
) -> None:
    started = time.monotonic()
    with pytest.raises(DataUnavailableError) as caught:
        load_task(task, DataSettings(cache_dir=str(tmp_path / "my cache")))
    said, target = str(caught.value), tmp_path / "my cache" / source.OFFICIAL.name
    assert said.startswith(f"{title} is not in ")
    assert f"curl -L --create-dirs --output '{target}' {source.OFFICIAL.url}" in said
    assert "--data-dir" in said and "\n" not in said
    assert list(tmp_path.iterdir()) == []
    assert time.monotonic() - started < 3
    for folder, words in ((tmp_path, f"holds no .*{target.name}.*or leave"), (target, "does not exist")):
        with pytest.raises(InputError, match=words) as refused:
            load_task(task, DataSettings(data_dir=str(folder), cache_dir=str(tmp_path)))
        assert not isinstance(refused.value, DataUnavailableError)


def test_a_server_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "TIMEOUT", 0.2)
    before = socket.getdefaulttimeout()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        serve_at(silent.getsockname()[1], "0", monkeypatch)
        with pytest.raises(DataUnavailableError, match="timed out"):
            load_reviews(None, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert socket.getdefaulttimeout() == before


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_asked(
    server: type[Server], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataUnavailableError, match="file/cache"):
        load_reviews(None, tmp_path / "file" / "cache")
    assert server.asked == 0
