"""The download of IMDb: resumed, verified, and given up in one line, whatever the server does."""

import gzip
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from test_imdb import contents, expected_contents, members, small_and_offline, tar_bytes

from data_pipeline import DataSettings, DataUnavailableError, load_task, main
from tasks import imdb, imdb_download
from tasks.imdb import load_reviews

__all__ = ["small_and_offline"]  # a fixture for every test here


class Server(BaseHTTPRequestHandler):
    """Serves `content`; `cuts` are the numbers of bytes after which successive answers break off."""

    content: ClassVar[bytes] = b""
    cuts: ClassVar[list[int]] = []
    ranges: ClassVar[bool] = True
    status: ClassVar[int] = 200
    fault: ClassVar[str] = ""
    busy: ClassVar[int] = 0  # answers with 503 that are to come
    asked: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        Server.asked.append(wanted)
        if self.fault or Server.busy:
            return self.misbehave(wanted)
        start = int(wanted.split("=")[1].rstrip("-")) if wanted and self.ranges else 0
        self.send_response(206 if start and self.status == 200 else self.status)
        self.send_header("Content-Length", str(len(self.content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        self.end_headers()
        stop = start + Server.cuts.pop(0) if Server.cuts else len(self.content)
        self.wfile.write(self.content[start:stop])

    def misbehave(self, wanted: str | None) -> None:
        if Server.busy:
            Server.busy -= 1
            self.send_response(503)
            self.end_headers()
            return
        page = b"<html>Log in to use this network</html>"
        self.send_response(206 if self.fault == "another part" else 200)
        if self.fault == "another part":
            self.send_header("Content-Range", f"bytes 0-{len(self.content) - 1}/{len(self.content)}")
        if self.fault == "announced":
            self.send_header("Content-Length", "7")
        self.end_headers()
        self.wfile.write(page if self.fault == "HTML" else self.content)
        while self.fault == "endless":
            try:
                self.wfile.write(bytes(2**16))
            except OSError:
                return

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    content = gzip.compress(tar_bytes(members()), compresslevel=1, mtime=0)
    digest = hashlib.sha256(content).hexdigest()
    Server.content, Server.cuts, Server.ranges, Server.status, Server.asked = content, [], True, 200, []
    Server.fault, Server.busy = "", 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        monkeypatch.setattr(imdb_download, "URL", f"http://127.0.0.1:{running.server_port}/aclImdb_v1.tar.gz")
        monkeypatch.setattr(imdb_download, "SIZE", len(content))
        for module in (imdb_download, imdb):
            monkeypatch.setattr(module, "SHA256", digest)
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Server
        running.shutdown()
        thread.join()


def test_what_is_nowhere_is_downloaded_once(server: type[Server], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        reviews = load_reviews(tmp_path / "empty", tmp_path / "cache")
        assert contents(reviews) == expected_contents() and reviews.official
    assert server.asked == [None]
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert names[0] == "aclImdb_v1.tar.gz" and len(names) == 2
    (tmp_path / "cache" / "aclImdb_v1.tar.gz").unlink()  # what was read of it is enough
    assert contents(load_reviews(None, tmp_path / "cache")) == expected_contents()
    assert server.asked == [None]


def test_a_broken_download_is_resumed_within_the_run_and_by_the_next(
    server: type[Server], tmp_path: Path
) -> None:
    server.cuts = [100, 50, 30]
    with pytest.raises(DataUnavailableError, match="run again to resume"):
        load_reviews(None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["aclImdb_v1.tar.gz.part"]
    assert (tmp_path / "aclImdb_v1.tar.gz.part").read_bytes() == server.content[:180]
    assert contents(load_reviews(None, tmp_path)) == expected_contents()
    assert server.asked == [None, "bytes=100-", "bytes=150-", "bytes=180-"]
    assert (tmp_path / "aclImdb_v1.tar.gz").read_bytes() == server.content
    assert not (tmp_path / "aclImdb_v1.tar.gz.part").exists()


def test_a_server_that_cannot_resume_is_asked_for_the_whole(server: type[Server], tmp_path: Path) -> None:
    (tmp_path / "aclImdb_v1.tar.gz.part").write_bytes(server.content[:77])
    server.ranges = False
    assert main(["imdb", "--data-dir", str(tmp_path)]) == 0
    assert (tmp_path / "aclImdb_v1.tar.gz").read_bytes() == server.content


@pytest.mark.parametrize("fault", ["content", "part", "longer part"])
def test_a_download_with_a_wrong_checksum_is_thrown_away(
    server: type[Server], tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if fault == "content":
        server.content = server.content[:2] + bytes(len(server.content) - 2)
    else:
        length = 50 if fault == "part" else len(server.content) + 5
        (tmp_path / "aclImdb_v1.tar.gz.part").write_bytes(bytes(length))
    assert main(["imdb", "--data-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "sha256" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [404, 503])
def test_an_error_of_the_server_leaves_nothing(server: type[Server], tmp_path: Path, status: int) -> None:
    server.status = status
    with pytest.raises(DataUnavailableError, match=f"answers {status}"):
        load_reviews(None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_the_command_to_run_is_named_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    (tmp_path / "my data").mkdir()
    settings = DataSettings(data_dir=str(tmp_path / "my data"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataUnavailableError) as caught:
        load_task("imdb", settings)
    target = tmp_path / "my data" / "aclImdb_v1.tar.gz"
    assert f"curl -L --create-dirs --output '{target}' {imdb_download.URL}" in str(caught.value)
    assert "--data-dir" in str(caught.value) and "\n" not in str(caught.value)
    assert main(["imdb", "--data-dir", str(tmp_path / "new")]) == 2
    assert "curl -L" in capsys.readouterr().err
    assert not any(path.is_file() for path in tmp_path.rglob("*")) and not (tmp_path / "new").exists()
    assert time.monotonic() - started < 3


def test_a_server_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imdb_download, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/aclImdb_v1.tar.gz"
        monkeypatch.setattr(imdb_download, "URL", url)
        with pytest.raises(DataUnavailableError, match="timed out"):
            load_reviews(None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_download_into_a_folder_that_cannot_be_written_is_missing_data(
    server: type[Server], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataUnavailableError):
        load_reviews(None, tmp_path / "file" / "cache")
    assert server.asked == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("HTML", "something else than an archive, as a page of HTML"),
        ("announced", "the server offers 7 bytes instead of"),
        ("another part", "another part than asked for"),
    ],
)
def test_what_is_not_the_archive_is_told_and_keeps_what_had_arrived(
    fault: str, message: str, server: type[Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "aclImdb_v1.tar.gz.part"
    part.write_bytes(server.content[:60])
    server.fault = fault
    assert main(["imdb", "--data-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert part.read_bytes() == server.content[:60]
    assert len(server.asked) == 1  # asking again would not help
    server.fault = ""
    assert main(["imdb", "--data-dir", str(tmp_path)]) == 0
    assert server.asked[-1] == "bytes=60-"


def test_of_an_endless_body_no_more_is_read_than_the_archive_has(
    server: type[Server], tmp_path: Path
) -> None:
    server.fault = "endless"
    assert main(["imdb", "--data-dir", str(tmp_path)]) == 0
    assert (tmp_path / "aclImdb_v1.tar.gz").read_bytes() == server.content


def test_a_server_that_is_busy_is_asked_again_after_longer_and_longer_pauses(
    server: type[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("tasks.imdb_download.time.sleep", pauses.append)
    server.busy = 2
    assert main(["imdb", "--data-dir", str(tmp_path)]) == 0
    assert pauses == [0.01, 0.02]


def test_a_body_that_hardly_moves_is_given_up(
    server: type[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imdb_download, "SLOW_SECONDS", -1.0)
    monkeypatch.setattr(imdb_download, "SLOWEST", 10**12)
    monkeypatch.setattr(imdb_download, "CHUNK", 16)
    with pytest.raises(DataUnavailableError, match="bytes a second came; run again to resume"):
        load_reviews(None, tmp_path)


@pytest.mark.parametrize("fault", ["HTML", "wrong bytes", "nothing"])
def test_the_second_source_is_asked_where_the_first_has_no_archive(
    fault: str, server: type[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = imdb_download.URL
    content = server.content
    answers: dict[str, Callable[[], bytes]] = {
        "HTML": lambda: b"<html></html>",
        "wrong bytes": lambda: content[:-1] + b"x",
        "nothing": bytes,
    }

    class Bad(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[fault]())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Bad) as bad:
        thread = threading.Thread(target=bad.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(imdb_download, "URL", f"http://127.0.0.1:{bad.server_port}/aclImdb_v1.tar.gz")
        monkeypatch.setattr(imdb_download, "SECOND_URL", right)
        assert contents(load_reviews(None, tmp_path)) == expected_contents()
        bad.shutdown()
        thread.join()


def test_a_second_process_waits_for_nothing_and_is_told_of_the_first(
    server: type[Server], tmp_path: Path
) -> None:
    with (tmp_path / "aclImdb_v1.tar.gz.part").open("ab") as file:
        imdb_download._lock(file)
        with pytest.raises(DataUnavailableError, match="another process is downloading it"):
            load_reviews(None, tmp_path)
    assert server.asked == []
