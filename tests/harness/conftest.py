"""Fixtures: for data preparation a local server and the three programs with a temporary data folder, for reports a working folder."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import prepare, prepare_pieces, prepare_task
from utils.errors import UserError, sentence


class Server(ThreadingHTTPServer):
    """Serves `files` by path; one may be a function of the handler, which answers in its own way. `ranges`: whether Range is honoured.
    The next `cuts` answers end after `piece` bytes. `status`: of every answer unless 200. `asked`: path and Range of each request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.ranges, self.cuts, self.piece, self.status, self.asked = {}, True, 0, 5_000, 200, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server, wanted, content = self.server, self.headers.get("Range"), self.server.files.get(self.path)
        server.asked.append((self.path, wanted))
        if callable(content):
            content(self)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
        status = 404 if content is None else 416 if start >= len(content) > 0 else 206 if start else 200
        status = server.status if server.status != 200 else status
        body = content[start:] if status in (200, 206) else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.cuts:
            server.cuts -= 1
            body = body[: server.piece]
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server():
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(data_dir, capsys, monkeypatch):
    """run(program, *argv) -> (the folder on the last line of stdout, stderr)."""
    for program in (prepare, prepare_pieces, prepare_task):
        monkeypatch.setattr(program, "DATA_DIR", data_dir)

    def call(program, *argv: object) -> tuple[Path, str]:
        assert program.main([str(arg) for arg in argv]) == 0
        out, err = capsys.readouterr()
        return Path(out.splitlines()[-1]), err

    return call


@pytest.fixture
def refused(run, data_dir):
    """refused(program, *argv) -> the error message of the command; the data folder is unchanged."""

    def call(program, *argv: object) -> str:
        before = state(data_dir)
        with pytest.raises((UserError, OSError)) as error:
            run(program, *argv)
        said = sentence(error.value)
        assert state(data_dir) == before and "\n" not in said
        return said

    return call


def state(folder: Path) -> dict[Path, int]:
    """Every file, folder and link below `folder`, with modification times except for folders."""
    return {path: 0 if path.is_dir() else path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder with a page that has the markers."""
    monkeypatch.chdir(tmp_path)
    Path("page.md").write_bytes(b"# Title\r\n\n<!-- table1:begin -->\nold\n<!-- table1:end -->\ntail, \xc3\xa9\n")
    return tmp_path
