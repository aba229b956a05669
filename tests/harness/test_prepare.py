"""data/prepare.py: what it writes, what it refuses, that it leaves nothing half done, and its download against a local server."""

import gzip
import hashlib
import importlib.util
import io
import lzma
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from utils.data.corpus import Corpus
from utils.errors import UserError

SCRIPT = Path(__file__).parents[2] / "data" / "prepare.py"
spec = importlib.util.spec_from_file_location("prepare_script", SCRIPT)
prepare = sys.modules["prepare_script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)

TEXT = np.random.default_rng(0).integers(0, 256, 20_003, dtype=np.uint8).tobytes()


def zipped(*contents: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for index, content in enumerate(contents):
            archive.writestr(f"text{index}", content)
    return buffer.getvalue()


ZIP = zipped(TEXT)


def known(url: str = "http://127.0.0.1:9/", hashed: bool = True) -> dict[str, prepare.Known]:
    digest, zip_digest = hashlib.sha256(TEXT).hexdigest(), hashlib.sha256(ZIP).hexdigest()
    return {"enwik8": prepare.Known(url, len(TEXT), "sha256", digest, zip_digest if hashed else None)}


@pytest.fixture
def run(data_dir, capsys):
    """run(*argv, known=...) -> (the folder named on the last line of stdout, stderr)."""

    def call(*argv: object, known: dict[str, prepare.Known] = known()) -> tuple[Path, str]:  # noqa: B008
        assert prepare.main([str(arg) for arg in argv], known, data_dir) == 0
        out, err = capsys.readouterr()
        return Path(out.splitlines()[-1]), err

    return call


def refused(run, data_dir: Path, match: str, *argv: object, **kwargs: object) -> None:
    """The command ends in a UserError and leaves the data folder as it was."""
    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=match):
        run(*argv, **kwargs)
    assert {path: path.stat().st_mtime_ns for path in data_dir.rglob("*") if path.is_file()} == before
    assert not list(data_dir.glob(".*"))


def command(*argv: object, cwd: Path = SCRIPT.parent.parent) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, argv)], cwd=cwd, capture_output=True, text=True, check=False)


def contents(folder: Path) -> list[bytes]:
    return [(folder / f"{split}.bin").read_bytes() for split in ("train", "valid", "test")]


# texts from files


def test_a_folder_holds_the_splits_and_their_meta(run, data_dir, tmp_path):
    source = tmp_path / "some.txt"
    source.write_bytes(TEXT)
    folder, _ = run("mine", "--source", source)
    assert folder == data_dir / "mine" and contents(folder) == [TEXT[:18_003], TEXT[18_003:19_003], TEXT[19_003:]]
    corpus = Corpus.open(folder)
    corpus.verify()
    assert {key: corpus.meta[key] for key in ("schema", "name", "title", "source", "official_text", "symbols")} == {
        "schema": 1,
        "name": "mine",
        "title": "some.txt, 0.02 MB",
        "source": "some.txt (20,003 bytes)",
        "official_text": False,
        "symbols": 256,
    }
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "test.bin", "train.bin", "valid.bin"]
    assert [path.name for path in data_dir.iterdir()] == ["mine"]
    assert folder.stat().st_mode == data_dir.stat().st_mode


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".xz", lzma.compress), (".gz", gzip.compress), (".zip", zipped)])
def test_every_format_gives_the_same_text(run, tmp_path, suffix, pack):
    (tmp_path / f"a{suffix}").write_bytes(pack(TEXT))
    folder, _ = run("mine", "--source", tmp_path / f"a{suffix}", "--out", tmp_path / "deep" / "out", "--title", "A text")
    assert folder == tmp_path / "deep" / "out" and b"".join(contents(folder)) == TEXT
    assert Corpus.open(folder).title == "A text"


def test_several_files_are_joined_in_order(run, tmp_path):
    (tmp_path / "b").write_bytes(TEXT[:9_000])
    (tmp_path / "a.xz").write_bytes(lzma.compress(TEXT[9_000:]))
    folder, _ = run("mine", "--source", tmp_path / "b", "--source", tmp_path / "a.xz")
    assert b"".join(contents(folder)) == TEXT and Corpus.open(folder).title == "b + a, 0.02 MB"


def test_official_text_drops_newlines_after_splitting(run, tmp_path):
    (tmp_path / "a").write_bytes(TEXT)
    plain, _ = run("mine", "--source", tmp_path / "a", "--out", tmp_path / "plain")
    official, _ = run("mine", "--source", tmp_path / "a", "--out", tmp_path / "official", "--official_text")
    assert contents(official) == [content.replace(b"\n", b"") for content in contents(plain)]
    meta = Corpus.open(official).meta
    assert meta["official_text"] and meta["symbols"] == 255 and meta["title"] == "a, 0.02 MB, newlines dropped"


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("cut.xz", lzma.compress(TEXT)[:-100], r"cut.xz \([\d,]+ bytes\) is not a whole .xz file"),
        ("bad.xz", TEXT, r"bad.xz \(20,003 bytes\) is not a whole .xz file"),
        ("cut.gz", gzip.compress(TEXT)[:-100], "cut.gz .* is not a whole .gz file"),
        ("bad.gz", TEXT, "bad.gz .* is not a whole .gz file"),
        ("changed.gz", gzip.compress(TEXT, 0)[:500] + b"x" + gzip.compress(TEXT, 0)[501:], "changed.gz .* is not a whole .gz file"),
        ("cut.zip", ZIP[:-100], "cut.zip .* is not a whole .zip file"),
        ("changed.zip", ZIP[:500] + bytes([ZIP[500] ^ 1]) + ZIP[501:], "changed.zip .* is not a whole .zip file"),
        ("two.zip", zipped(TEXT, TEXT), "two.zip .* holds 2 files"),
        ("none.zip", zipped(), "none.zip .* holds 0 files"),
        ("empty", b"", r"empty \(0 bytes\) gives a text of 0 bytes"),
        ("empty.xz", b"", "empty.xz"),
        ("empty.gz", b"", "gives a text of 0 bytes"),
        ("short", b"x" * 999, r"short .* 999 bytes: at least 1,000"),
        ("absent", None, "absent is not a file"),
    ],
)
def test_cut_and_foreign_files_are_refused(run, data_dir, tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(run, data_dir, said, "mine", "--source", tmp_path / name)
    assert not (data_dir / "mine").exists()


def test_nothing_but_newlines_is_refused(run, data_dir, tmp_path):
    (tmp_path / "lines").write_bytes(b"\n" * 2_000)
    refused(run, data_dir, "leave out --official_text", "mine", "--source", tmp_path / "lines", "--official_text")


def test_command_lines_that_cannot_be_meant(run, data_dir, tmp_path):
    (tmp_path / "part").write_bytes(TEXT[:5_000])
    refused(run, data_dir, "mine is not one of enwik8, text8, pystdlib", "mine")
    refused(run, data_dir, "leave out --source", "pystdlib", "--source", tmp_path / "part")
    for name in ("../up", "a/b", ".hidden", ""):
        refused(run, data_dir, "cannot be that of a folder", name, "--source", tmp_path / "part")
    for title in ("enwik8", " Enwik8 "):
        refused(run, data_dir, "only enwik8, verified, is called that", "mine", "--source", tmp_path / "part", "--title", title)


def test_the_command_itself(tmp_path):
    (tmp_path / "a").write_bytes(TEXT)
    done = command("mine", "--source", "a", "--out", "out", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "out\n") and "prepared out" in done.stderr
    again = command("mine", "--source", "a", "--out", "out", cwd=tmp_path)
    assert (again.returncode, again.stdout, again.stderr) == (0, "out\n", "already prepared: out\n")
    (tmp_path / "cut.xz").write_bytes(lzma.compress(TEXT)[:-9])
    failed = command("mine", "--source", "cut.xz", "--out", "new", cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (2, "") and failed.stderr.startswith("error: cut.xz (") and failed.stderr.count("\n") == 1
    assert command("mine", "--no_such_option").returncode == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "cut.xz", "out"]


def test_the_program_needs_no_torch():
    assert command("--help").returncode == 0
    code = f"import sys, runpy; runpy.run_path({str(SCRIPT)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# folders that are there


def test_a_prepared_folder_is_left_alone(run, data_dir, tmp_path):
    (tmp_path / "a").write_bytes(TEXT)
    folder, _ = run("mine", "--source", tmp_path / "a", "--title", "T")
    before = (folder / "meta.json").stat().st_mtime_ns
    for more in ([], ["--source", tmp_path / "a"], ["--verify"], ["--source", tmp_path / "a", "--verify", "--title", "T"]):
        again, err = run("mine", *more)
        assert again == folder and "already prepared" in err and ("verified" in err) == ("--verify" in more)
    assert (folder / "meta.json").stat().st_mtime_ns == before
    refused(run, data_dir, "official_text False, not True", "mine", "--official_text")
    refused(run, data_dir, "title 'T', not 'U'", "mine", "--title", "U")
    refused(run, data_dir, "name 'mine', not 'other'", "other", "--out", folder)
    (tmp_path / "a").write_bytes(TEXT[::-1])  # the same name and size: only --verify can tell
    refused(run, data_dir, "another content of a", "mine", "--source", tmp_path / "a", "--verify")
    (tmp_path / "a").write_bytes(TEXT[1:])
    refused(run, data_dir, "source 'a .20,003 bytes.*20,002 bytes", "mine", "--source", tmp_path / "a")
    run("mine", "--source", tmp_path / "a", "--force")
    assert b"".join(contents(folder)) == TEXT[1:]


def test_a_damaged_folder_is_refused_and_mended_by_force(run, data_dir, tmp_path):
    (tmp_path / "a").write_bytes(TEXT)
    folder, _ = run("mine", "--source", tmp_path / "a")
    train = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(train[:-1] + bytes([train[-1] ^ 1]))
    assert "already" in run("mine", "--source", tmp_path / "a")[1]  # the cheap check cannot see it
    refused(run, data_dir, "sha256", "mine", "--source", tmp_path / "a", "--verify")
    (folder / "train.bin").write_bytes(train[:-1])
    refused(run, data_dir, "train.bin has 18,002 bytes, meta.json says 18,003", "mine", "--source", tmp_path / "a")
    run("mine", "--source", tmp_path / "a", "--force")
    assert (folder / "train.bin").read_bytes() == train


def test_a_folder_of_something_else_is_not_touched(run, data_dir, tmp_path):
    (tmp_path / "a").write_bytes(TEXT)
    (data_dir / "mine").mkdir()
    run("mine", "--source", tmp_path / "a")  # an empty folder may be filled
    (data_dir / "mine" / "meta.json").unlink()
    refused(run, data_dir, "holds test.bin but no meta.json", "mine", "--source", tmp_path / "a")
    (data_dir / "mine" / "notes").write_bytes(b"keep")
    run("mine", "--source", tmp_path / "a", "--force")
    assert (data_dir / "mine" / "notes").read_bytes() == b"keep"
    (data_dir / "file").write_bytes(b"keep")
    refused(run, data_dir, "is a file, not a folder", "file", "--source", tmp_path / "a", "--force")


def test_a_folder_behind_a_link(run, data_dir, tmp_path):
    (tmp_path / "a").write_bytes(TEXT)
    (tmp_path / "disk").mkdir()
    (data_dir / "mine").symlink_to(tmp_path / "disk")
    assert run("mine", "--source", tmp_path / "a")[0] == data_dir / "mine"
    assert b"".join(contents(tmp_path / "disk")) == TEXT and (data_dir / "mine").is_symlink()


@pytest.mark.parametrize("failing", ["write_split", "install", "sync_folder"])
def test_an_interrupted_run_leaves_nothing(run, data_dir, tmp_path, monkeypatch, failing):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    (tmp_path / "a").write_bytes(TEXT)
    monkeypatch.setattr(prepare, failing, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("mine", "--source", tmp_path / "a")
    assert not list(data_dir.iterdir())


def test_a_replacement_that_is_interrupted_is_not_accepted(run, data_dir, tmp_path, monkeypatch):
    def replace(old: Path, new: Path) -> None:
        if new.name == "valid.bin":
            raise KeyboardInterrupt
        real(old, new)

    (tmp_path / "a").write_bytes(TEXT)
    (tmp_path / "b").write_bytes(TEXT[::-1])  # the sizes are the same: only the lack of meta.json tells
    folder, _ = run("mine", "--source", tmp_path / "a")
    real = os.replace
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        run("mine", "--source", tmp_path / "b", "--force")
    with pytest.raises(UserError, match=r"no meta\.json"):
        Corpus.open(folder)
    assert [path.name for path in data_dir.iterdir()] == ["mine"]


def test_two_processes_may_prepare_the_same(run, data_dir, tmp_path, monkeypatch):
    def slower(built: Path, out: Path) -> None:
        shutil.copytree(built, out)
        os.rename(built, out)  # fails, since the folder is full

    (tmp_path / "a").write_bytes(TEXT)
    monkeypatch.setattr(prepare, "install", slower)
    assert b"".join(contents(run("mine", "--source", tmp_path / "a")[0])) == TEXT
    assert [path.name for path in data_dir.iterdir()] == ["mine"]


def test_a_full_disk_is_said_before_and_while_writing(run, data_dir, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(TEXT)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(prepare.SPACE_MARGIN + len(TEXT)))
    refused(run, data_dir, "MB are needed", "mine", "--source", tmp_path / "a")
    (tmp_path / "b.xz").write_bytes(lzma.compress(b"ab" * 50_000))  # tells its size only when it is unpacked
    refused(run, data_dir, "MB are needed", "mine", "--source", tmp_path / "b.xz")
    monkeypatch.undo()

    def full(*args):
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr(os, "fsync", full)
    refused(run, data_dir, "x: No space left on device", "mine", "--source", tmp_path / "a")


# known texts


def test_pystdlib(run, data_dir):
    folder, _ = run("pystdlib")
    meta = Corpus.open(folder).meta
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert meta["title"] == f"Python {version} standard library source, 8.0 MB" and meta["source"].startswith(f"Python {version}.")
    assert [entry["bytes"] for entry in meta["splits"].values()] == [7_200_000, 400_000, 400_000]
    assert "already prepared" in run("pystdlib")[1]


def test_pystdlib_takes_library_files_only_in_hash_order(tmp_path):
    wanted = ["abc.py", "xml/sax.py", "json/decoder.py", "config.py"]
    others = ["site-packages/x.py", "test/x.py", "json/tests/x.py", "lib2to3/x.py", "sitecustomize.py", "config-3.11/x.py", "abc.pyc"]
    for name in wanted + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [path.relative_to(tmp_path).as_posix() for path in prepare.stdlib_files(tmp_path)]
    assert found == sorted(wanted, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


@pytest.mark.parametrize("place", ["enwik8.zip", "enwik8/enwik8.zip", "enwik8/enwik8"])
def test_a_known_text_put_there_by_hand(run, data_dir, place):
    (data_dir / place).parent.mkdir(exist_ok=True)
    (data_dir / place).write_bytes(ZIP if place.endswith("zip") else TEXT)
    folder, _ = run("enwik8")
    assert b"".join(contents(folder)) == TEXT and Corpus.open(folder).title == "enwik8" and (data_dir / place).exists()
    assert "already prepared" in run("enwik8")[1]


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".zip", zipped), (".xz", lzma.compress)])
def test_a_known_text_from_a_source_is_verified(run, data_dir, tmp_path, suffix, pack):
    (tmp_path / f"short{suffix}").write_bytes(pack(TEXT[:5_000]))
    (tmp_path / f"other{suffix}").write_bytes(pack(TEXT[::-1]))
    (tmp_path / f"right{suffix}").write_bytes(pack(TEXT))
    remedy = "prepare.py some_other_name --source"
    refused(run, data_dir, f"gives 5,000 bytes, but enwik8 has 20,003: .*{remedy}", "enwik8", "--source", tmp_path / f"short{suffix}")
    refused(run, data_dir, f"has sha256 .*{remedy}", "enwik8", "--source", tmp_path / f"other{suffix}", "--fallback", "pystdlib")
    folder, _ = run("enwik8", "--source", tmp_path / f"right{suffix}")
    assert b"".join(contents(folder)) == TEXT and Corpus.open(folder).title == "enwik8"


def test_the_known_texts_are_the_published_ones(tmp_path):
    text8 = prepare.KNOWN["text8"]
    assert text8.algorithm == "md5" and text8.bytes == prepare.KNOWN["enwik8"].bytes == 100_000_000
    places = [SCRIPT.parent / "enwik8.zip", SCRIPT.parent / "enwik8" / "enwik8.zip", SCRIPT.parent / "enwik8" / "enwik8"]
    sources = [path for path in places if path.is_file()]
    if not sources:
        pytest.skip("enwik8 is not in the data folder")
    assert prepare.main(["enwik8", "--source", str(sources[0]), "--out", str(tmp_path / "plain")]) == 0
    assert prepare.main(["enwik8", "--source", str(sources[0]), "--out", str(tmp_path / "official"), "--official_text"]) == 0
    symbols = [Corpus.open(tmp_path / name).meta["symbols"] for name in ("plain", "official")]
    assert symbols == [205, 204] and len(Corpus.open(tmp_path / "plain").train) == 90_000_000


# downloads


class Server(ThreadingHTTPServer):
    """Serves `content`; `ranges`: honours Range; `cuts`: how many answers end after `piece` bytes; `asked`: the Range of each request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.cuts, self.piece, self.status, self.asked = ZIP, True, 0, 5_000, 200, []
        self.known = known(f"http://127.0.0.1:{self.server_port}/enwik8.zip")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
        status = server.status if server.status != 200 else 416 if start >= len(server.content) > 0 else 206 if start else 200
        body = server.content[start:] if status in (200, 206) else b""
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


def downloaded(run, data_dir: Path, server: Server) -> None:
    folder, _ = run("enwik8", known=server.known)
    assert b"".join(contents(folder)) == TEXT and sorted(path.name for path in data_dir.iterdir()) == ["enwik8", "enwik8.zip"]


@pytest.mark.parametrize("hashed", [True, False])
def test_download(run, data_dir, server, hashed):
    server.known = known(server.known["enwik8"].url, hashed)
    downloaded(run, data_dir, server)
    shutil.rmtree(data_dir / "enwik8")
    downloaded(run, data_dir, server)  # from the zip that is now there
    assert server.asked == [None]


@pytest.mark.parametrize("have", [1, 7_000, len(ZIP)])
def test_a_part_is_resumed(run, data_dir, server, have):
    (data_dir / "enwik8.zip.part").write_bytes(ZIP[:have])
    downloaded(run, data_dir, server)
    assert server.asked == [f"bytes={have}-"]


def test_a_server_without_ranges_starts_again(run, data_dir, server):
    server.ranges = False
    (data_dir / "enwik8.zip.part").write_bytes(ZIP[:7_000])
    downloaded(run, data_dir, server)
    assert server.asked == ["bytes=7000-"]


@pytest.mark.parametrize("wrong", [b"x" * 7_000, b"x" * 50_000])
def test_a_wrong_part_is_thrown_away(run, data_dir, server, wrong):
    (data_dir / "enwik8.zip.part").write_bytes(wrong)
    downloaded(run, data_dir, server)
    assert server.asked == [f"bytes={len(wrong)}-", None]


def test_a_cut_connection_is_resumed(run, data_dir, server):
    server.cuts = 2
    downloaded(run, data_dir, server)
    assert server.asked == [None, "bytes=5000-", "bytes=10000-"]


def test_a_connection_cut_again_and_again_keeps_its_part(run, data_dir, server):
    server.cuts, server.piece = 100, 1_000
    with pytest.raises(UserError, match=r"connection was cut; 5,000 bytes are kept.*by hand, or use --fallback pystdlib"):
        run("enwik8", known=server.known)
    assert [path.name for path in data_dir.iterdir()] == ["enwik8.zip.part"]
    server.cuts = 0
    downloaded(run, data_dir, server)


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("content", [b"<html>log in first</html>", b"", zipped(TEXT[::-1]), ZIP[:-30]])
def test_wrong_content_is_not_kept(run, data_dir, server, content, hashed):
    server.known, server.content = known(server.known["enwik8"].url, hashed), content
    refused(run, data_dir, r"enwik8.zip (sent something else|cannot be downloaded) \(.*by hand", "enwik8", known=server.known)
    assert not (data_dir / "enwik8").exists()


def test_an_error_page_is_named(run, data_dir, server):
    server.status = 404
    refused(run, data_dir, "enwik8.zip cannot be downloaded .HTTP Error 404: Not Found.*", "enwik8", known=server.known)


def test_no_network_is_one_sentence_with_the_remedies(run, data_dir):
    said = r"^http://127.0.0.1:9/ cannot be downloaded \(.*refused\): put the file at .*enwik8\.zip by hand, or use --fallback pystdlib"
    refused(run, data_dir, said, "enwik8")


@pytest.mark.parametrize("status", [404, None])
def test_fallback(run, data_dir, server, status):
    server.status, texts = status or 200, server.known if status else known()
    folder, err = run("enwik8", "--fallback", "pystdlib", "--title", "enwik8", "--out", data_dir / "else", known=texts)
    assert folder == data_dir / "pystdlib" and Corpus.open(folder).title.startswith("Python 3.")
    assert (
        "cannot be downloaded" in err and "preparing pystdlib instead" in err and [path.name for path in data_dir.iterdir()] == ["pystdlib"]
    )


def test_fallback_is_not_taken_where_the_text_is_there(run, data_dir, server):
    folder, _ = run("enwik8", "--fallback", "pystdlib", known=server.known)
    assert folder == data_dir / "enwik8"
    shutil.rmtree(folder)
    (data_dir / "enwik8.zip").write_bytes(ZIP[:-100])  # a mistake to mend, not an absent text
    refused(run, data_dir, "is not a whole .zip file", "enwik8", "--fallback", "pystdlib", known=server.known)
