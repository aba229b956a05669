"""data/prepare.py: the splits it writes, the sources it refuses, published texts and their download from a local server."""

import gzip
import hashlib
import io
import lzma
import shutil
import sys
import sysconfig
import time
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data import prepare, reading
from tests.conftest import ROOT
from utils.data import download, sources
from utils.data.corpus import Corpus
from utils.errors import UserError

TEXT = np.random.default_rng(0).integers(0, 256, 20_003, dtype=np.uint8).tobytes()


def zipped(*contents: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for index, content in enumerate(contents):
            archive.writestr(f"text{index}", content)
    return buffer.getvalue()


ZIP = zipped(TEXT)


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def publish(monkeypatch, name: str = "enwik8", url: str = "http://127.0.0.1:9/enwik8.zip", archive: bytes | None = ZIP) -> None:
    """Add or replace the entry that makes TEXT a published text."""
    entry = sources.Text(url, len(TEXT), sha256(TEXT), archive and sha256(archive))
    monkeypatch.setitem(sources.TEXTS, name, entry)


def contents(folder: Path) -> list[bytes]:
    return [(folder / f"{split}.bin").read_bytes() for split in ("train", "valid", "test")]


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "some.txt").write_bytes(TEXT)
    return tmp_path / "some.txt"


# texts from files


def test_a_folder_holds_the_splits_and_their_meta(run, data_dir, source):
    folder, err = run(prepare, "mine", "--source", source)
    assert folder == data_dir / "mine" and contents(folder) == [TEXT[:18_003], TEXT[18_003:19_003], TEXT[19_003:]]
    assert err == f"prepared {folder}: some.txt, 0.02 MB, from some.txt (20,003 bytes)\n"
    corpus = Corpus.open(folder)
    corpus.verify()
    assert corpus.unit == "bytes" and corpus.meta == {
        "schema": 1,
        "name": "mine",
        "title": "some.txt, 0.02 MB",
        "source": "some.txt (20,003 bytes)",
        "text": {"bytes": 20_003, "sha256": hashlib.sha256(TEXT).hexdigest()},
        "official_text": False,
        "splits": corpus.meta["splits"],
        "symbols": 256,
    }
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "test.bin", "train.bin", "valid.bin"]


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".xz", lzma.compress), (".gz", gzip.compress), (".zip", zipped)])
def test_every_format_gives_the_same_text(run, tmp_path, suffix, pack):
    (tmp_path / f"a{suffix}").write_bytes(pack(TEXT))
    folder, _ = run(prepare, "mine", "--source", tmp_path / f"a{suffix}", "--title", "A text")
    assert b"".join(contents(folder)) == TEXT and Corpus.open(folder).title == "A text"


def test_several_files_are_joined_in_order(run, tmp_path):
    (tmp_path / "b").write_bytes(TEXT[:9_000])
    (tmp_path / "a.xz").write_bytes(lzma.compress(TEXT[9_000:]))
    folder, _ = run(prepare, "mine", "--source", tmp_path / "b", "--source", tmp_path / "a.xz")
    assert b"".join(contents(folder)) == TEXT and Corpus.open(folder).title == "b + a, 0.02 MB"


def test_official_text_drops_newlines_after_splitting(run, source, tmp_path):
    plain, _ = run(prepare, "plain", "--source", source)
    official, _ = run(prepare, "official", "--source", source, "--official_text")
    assert contents(official) == [content.replace(b"\n", b"") for content in contents(plain)]
    meta = Corpus.open(official).meta
    assert meta["official_text"] and meta["symbols"] == 255 and meta["title"] == "some.txt, 0.02 MB, newlines dropped"


def test_the_held_out_part_may_be_larger(run, refused, source):
    folder, _ = run(prepare, "mine", "--source", source, "--held_out", "5000")
    assert contents(folder) == [TEXT[:10_003], TEXT[10_003:15_003], TEXT[15_003:]] and Corpus.open(folder).meta["held_out"] == 5_000
    assert "already" in run(prepare, "mine", "--held_out", "5000")[1]
    assert "held_out 5000, not None" in refused(prepare, "mine")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("cut.xz", lzma.compress(TEXT)[:-100], " bytes) is not a complete .xz file ("),
        ("bad.xz", TEXT, "bad.xz (20,003 bytes) is not a complete .xz file ("),
        ("cut.gz", gzip.compress(TEXT)[:-100], " is not a complete .gz file ("),
        ("bad.gz", TEXT, " is not a complete .gz file ("),
        ("changed.gz", gzip.compress(TEXT, 0)[:500] + b"x" + gzip.compress(TEXT, 0)[501:], " is not a complete .gz file ("),
        ("cut.zip", ZIP[:-100], " is not a complete .zip file ("),
        ("changed.zip", ZIP[:500] + bytes([ZIP[500] ^ 1]) + ZIP[501:], " is not a complete .zip file ("),
        ("two.zip", zipped(TEXT, TEXT), " holds 2 files: give a .zip with exactly one"),
        ("none.zip", zipped(), " holds 0 files: give a .zip with exactly one"),
        ("empty", b"", "empty (0 bytes) has 0 bytes of text: give at least 1,000"),
        ("empty.xz", b"", "empty.xz (0 bytes) "),
        ("empty.gz", b"", "empty.gz (0 bytes) has 0 bytes of text: give at least 1,000"),
        ("short", b"x" * 999, "short (999 bytes) has 999 bytes of text: give at least 1,000"),
        ("absent", None, "absent is not a file: give a plain, .xz, .gz or .zip file"),
    ],
)
def test_damaged_and_short_sources_are_refused(refused, data_dir, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    line = refused(prepare, "mine", "--source", tmp_path / name)
    assert name in line and message in line and not list(data_dir.iterdir())


def test_unusable_command_lines_are_refused(refused, source, tmp_path):
    (tmp_path / "lines").write_bytes(b"\n" * 2_000)
    for argv, message in (
        (["mine"], "mine is not one of enwik8, text8, wikitext-2, wikitext-103, lm1b, pystdlib: give its text with --source FILE"),
        (["pystdlib", "--source", source], "leave out --source"),
        (["mine", "--source", source, "--title", "enwik8"], "--title 'enwik8' is reserved for the verified text of that name"),
        (["mine", "--source", source, "--title", " Enwik8 "], "--title ' Enwik8 ' is reserved"),
        (["mine", "--source", tmp_path / "lines", "--official_text"], "leave out --official_text"),
        (["mine", "--source", source, "--held_out", "10002"], "--held_out 10002 leaves no training text"),
        (["mine", "--source", source, "--held_out", "0"], "--held_out 0 leaves nothing to test on: give at least 1 byte"),
        (["mine", "--source", source, "--held_out", "-5"], "--held_out -5 leaves nothing to test on: give at least 1 byte"),
        (["mine", "--source", source, "--held_out", "1e12"], "argument --held_out: '1e12' is not a whole number up to "),
        (["mine", "--source", source, "--held_out", "9" * 30], "'99999999999999999999' is not a whole number up to "),
        (["mine", "--source", source, "--held_out", "9" * 18], "leaves no training text"),
        (["mine", "--source", source, "--title", "a\nb"], "--title 'a\\nb' cannot be shown in tables: give at most 200 characters"),
        (["enwik8", "--source", source, "--held_out", "500"], "enwik8 is split as published: leave out --held_out"),
    ):
        assert message in refused(prepare, *argv)


def test_a_prepared_text_is_recognised_by_its_settings(run, refused, source):
    folder, _ = run(prepare, "mine", "--source", source, "--title", "T")
    for more in ([], ["--source", source], ["--verify"], ["--source", source, "--verify", "--title", "T"]):
        again, err = run(prepare, "mine", *more)
        assert again == folder and "already prepared" in err and ("verified" in err) == ("--verify" in more)
    assert "official_text False, not True" in refused(prepare, "mine", "--official_text")
    assert "title 'T', not 'U'" in refused(prepare, "mine", "--title", "U")
    assert "name 'mine', not 'other'" in refused(prepare, "other", "--out", folder)
    source.write_bytes(TEXT[1:])
    assert "source 'some.txt (20,003 bytes)', not 'some.txt (20,002 bytes)'" in refused(prepare, "mine", "--source", source)


def test_verify_finds_changed_content_of_the_same_size(run, refused, source):
    folder, _ = run(prepare, "mine", "--source", source)
    source.write_bytes(TEXT[::-1])
    assert "already" in run(prepare, "mine", "--source", source)[1]
    assert "was made from other content of some.txt" in refused(prepare, "mine", "--source", source, "--verify")
    (folder / "train.bin").write_bytes(TEXT[:18_003][::-1])
    assert "train.bin has sha256" in refused(prepare, "mine", "--verify")


# published texts


def test_pystdlib(run, monkeypatch):
    monkeypatch.setattr(reading, "PYSTDLIB_BYTES", 800_000)
    folder, _ = run(prepare, "pystdlib")
    meta, version = Corpus.open(folder).meta, f"{sys.version_info.major}.{sys.version_info.minor}"
    assert meta["title"] == f"Python {version} standard library source, 0.8 MB" and meta["source"].startswith(f"Python {version}.")
    assert [entry["bytes"] for entry in meta["splits"].values()] == [720_000, 40_000, 40_000]
    assert "already prepared" in run(prepare, "pystdlib")[1]


def test_the_standard_library_is_long_enough():
    paths = reading.stdlib_files(Path(sysconfig.get_path("stdlib")))
    assert sum(path.stat().st_size for path in paths) > reading.PYSTDLIB_BYTES == 8_000_000


def test_pystdlib_takes_library_files_only_in_hash_order(tmp_path):
    wanted = ["abc.py", "xml/sax.py", "json/decoder.py", "config.py"]
    others = ["site-packages/x.py", "test/x.py", "json/tests/x.py", "lib2to3/x.py", "sitecustomize.py", "config-3.11/x.py", "abc.pyc"]
    for name in wanted + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [path.relative_to(tmp_path).as_posix() for path in reading.stdlib_files(tmp_path)]
    assert found == sorted(wanted, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


@pytest.mark.parametrize("place", ["enwik8.zip", "enwik8/enwik8.zip", "enwik8/enwik8"])
def test_a_published_text_that_lies_in_the_data_folder(run, data_dir, place, monkeypatch):
    publish(monkeypatch)
    (data_dir / place).parent.mkdir(exist_ok=True)
    (data_dir / place).write_bytes(ZIP if place.endswith("zip") else TEXT)
    folder, _ = run(prepare, "enwik8")
    assert b"".join(contents(folder)) == TEXT and Corpus.open(folder).title == "enwik8" and (data_dir / place).exists()
    assert "already prepared" in run(prepare, "enwik8")[1]


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".zip", zipped), (".xz", lzma.compress)])
def test_a_published_text_from_a_source_is_verified(run, refused, tmp_path, suffix, pack, monkeypatch):
    publish(monkeypatch)
    short, other, right = (tmp_path / f"{name}{suffix}" for name in ("short", "other", "right"))
    for path, content in ((short, TEXT[:5_000]), (other, TEXT[::-1]), (right, TEXT)):
        path.write_bytes(pack(content))
    remedy = "for a different text choose another name, `python data/prepare.py some_other_name --source "
    assert f"has 5,000 bytes of text, but enwik8 has 20,003: {remedy}{short}`" in refused(prepare, "enwik8", "--source", short)
    line = refused(prepare, "enwik8", "--source", other, "--fallback", "pystdlib")
    assert f"has {sha256(TEXT[::-1])}, but enwik8 has {sha256(TEXT)}: {remedy}" in line
    folder, _ = run(prepare, "enwik8", "--source", right)
    assert b"".join(contents(folder)) == TEXT and Corpus.open(folder).title == "enwik8"


def test_enwik8_is_the_published_text(tmp_path):
    assert sources.TEXTS["text8"].digest.startswith("md5:") and {sources.TEXTS[name].bytes for name in ("enwik8", "text8")} == {100_000_000}
    places = [ROOT / "data" / name for name in ("enwik8.zip", "enwik8/enwik8.zip", "enwik8/enwik8")]
    found = [path for path in places if path.is_file()]
    if not found:
        pytest.skip("enwik8 is not in the data folder")
    for name, symbols, more in (("plain", 205, []), ("official", 204, ["--official_text"])):
        assert prepare.main(["enwik8", "--source", str(found[0]), "--out", str(tmp_path / name), *more]) == 0
        assert Corpus.open(tmp_path / name).meta["symbols"] == symbols
    assert len(Corpus.open(tmp_path / "plain").train) == 90_000_000


@pytest.mark.parametrize("file, pack", [("odes.zip", zipped), ("odes.gz", gzip.compress), ("odes.txt", bytes)])
def test_a_new_text_is_one_entry(run, refused, data_dir, server, monkeypatch, file, pack):
    packed = pack(TEXT)
    publish(monkeypatch, "odes", f"{server.url}/v1/{file}", packed)
    assert f"{server.url}/v1/{file} cannot be downloaded (HTTP Error 404: Not Found)" in refused(prepare, "odes")
    server.files[f"/v1/{file}"] = packed
    folder, _ = run(prepare, "odes")
    assert b"".join(contents(folder)) == TEXT and Corpus.open(folder).title == "odes"
    assert sorted(path.name for path in data_dir.iterdir()) == ["odes", file] and "already" in run(prepare, "odes")[1]
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"prepare one with `python data/prepare\.py odes`$"):
        Corpus.open(folder)
    assert "is reserved" in refused(prepare, "mine", "--source", data_dir / file, "--title", "Odes")


# downloads


@pytest.fixture
def enwik8(server, monkeypatch):
    server.files["/enwik8.zip"] = ZIP
    publish(monkeypatch, url=f"{server.url}/enwik8.zip")
    return server


@pytest.fixture
def downloads(run, data_dir, enwik8):
    """Assert that enwik8 is prepared and return the ranges that were asked for."""

    def call() -> list[str | None]:
        folder, _ = run(prepare, "enwik8")
        assert b"".join(contents(folder)) == TEXT and sorted(path.name for path in data_dir.iterdir()) == ["enwik8", "enwik8.zip"]
        return [wanted for _, wanted in enwik8.asked]

    return call


@pytest.mark.parametrize("archive", [ZIP, None])
def test_download(data_dir, enwik8, downloads, archive, monkeypatch):
    publish(monkeypatch, url=f"{enwik8.url}/enwik8.zip", archive=archive)
    assert downloads() == [None]
    shutil.rmtree(data_dir / "enwik8")
    assert downloads() == [None]  # from the file that is now there


@pytest.mark.parametrize("have", [1, 7_000, len(ZIP)])
def test_a_part_is_resumed(data_dir, downloads, have):
    (data_dir / "enwik8.zip.part").write_bytes(ZIP[:have])
    assert downloads() == [f"bytes={have}-"]


def test_a_server_without_ranges_starts_again(data_dir, enwik8, downloads):
    enwik8.ranges = False
    (data_dir / "enwik8.zip.part").write_bytes(ZIP[:7_000])
    assert downloads() == ["bytes=7000-"]


@pytest.mark.parametrize("size", [7_000, 50_000])
def test_a_wrong_part_is_discarded(data_dir, downloads, size):
    (data_dir / "enwik8.zip.part").write_bytes(b"x" * size)
    assert downloads() == [f"bytes={size}-", None]


def test_a_cut_connection_is_resumed(enwik8, downloads):
    enwik8.cuts = 2
    assert downloads() == [None, "bytes=5000-", "bytes=10000-"]


def test_a_connection_that_is_cut_repeatedly_keeps_its_part(run, data_dir, enwik8, downloads):
    enwik8.cuts, enwik8.piece = 100, 1_000
    with pytest.raises(UserError, match=r"\(the connection was cut\); 5,000 bytes are kept, rerun to resume: .* --fallback pystdlib"):
        run(prepare, "enwik8")
    assert [path.name for path in data_dir.iterdir()] == ["enwik8.zip.part"]
    enwik8.cuts = 0
    assert downloads()[-1] == "bytes=5000-"


@pytest.mark.parametrize("archive", [ZIP, None])
@pytest.mark.parametrize("content", [b"<html>log in first</html>", b"", zipped(TEXT[::-1]), ZIP[:-30]])
def test_unexpected_content_is_not_kept(refused, enwik8, content, archive, monkeypatch):
    publish(monkeypatch, url=f"{enwik8.url}/enwik8.zip", archive=archive)
    enwik8.files["/enwik8.zip"] = content
    line = refused(prepare, "enwik8")
    assert line.startswith((f"{enwik8.url}/enwik8.zip returned unexpected content (", f"{enwik8.url}/enwik8.zip cannot be downloaded ("))
    assert "by hand, or use --fallback pystdlib" in line


def endless(handler, headers: dict[str, str]) -> None:
    """Sends zeros for as long as anybody listens."""
    handler.send_response(200)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    with suppress(ConnectionError):
        while True:
            handler.wfile.write(bytes(1 << 16))


def redirecting(handler, to: str) -> None:
    handler.send_response(302)
    handler.send_header("Location", to)
    handler.end_headers()


def drip(handler, size: int) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(size))
    handler.end_headers()
    with suppress(ConnectionError):
        while True:
            handler.wfile.write(b"x")
            time.sleep(0.01)


def without_content(handler, first: bytes, again: bytes) -> None:
    with suppress(ConnectionError):
        handler.wfile.write(first)
        while True:
            handler.wfile.write(again)
            time.sleep(0.01)


SLOW = "cannot be downloaded (it sends fewer than 1,000 bytes a second)"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (partial(endless, headers={}), "is larger than 1,068,579 bytes, the most that enwik8.zip can have"),
        (partial(endless, headers={"Content-Length": "9" * 5_000}), "is larger than 1,068,579 bytes, the most that enwik8.zip can have"),
        (partial(endless, headers={"Content-Length": "-5"}), "is larger than 1,068,579 bytes, the most that enwik8.zip can have"),
        (partial(redirecting, to="file:///etc/hostname"), "cannot be downloaded (HTTP Error 302: "),
        (partial(redirecting, to="ftp://127.0.0.1/enwik8.zip"), "(it redirects to ftp://127.0.0.1/enwik8.zip, which is not followed)"),
        (partial(redirecting, to="http://[::"), "cannot be downloaded (Invalid IPv6 URL)"),
        (partial(drip, size=10_000), SLOW),
        (partial(without_content, first=b"", again=b"HTTP/1.1 100 Continue\r\n\r\n"), SLOW),
        (partial(without_content, first=b"HTTP/1.1 200 OK\r\nA: ", again=b"b"), SLOW),
        (partial(without_content, first=CHUNKED, again=b"0"), SLOW),
        (partial(without_content, first=CHUNKED + b"0\r\n", again=b"A: b\r\n"), SLOW),
    ],
    ids=["endless", "huge", "negative", "file", "ftp", "no address", "slow", "continue", "header", "chunk size", "trailer"],
)
def test_a_server_that_cannot_be_trusted(run, data_dir, enwik8, answer, fault, monkeypatch):
    monkeypatch.setattr(download, "PATIENCE", 0.1)
    monkeypatch.setattr(download, "DOWNLOAD_ATTEMPTS", 1)
    monkeypatch.setattr(reading, "PACKING", 1_048_576)
    enwik8.files["/enwik8.zip"] = answer
    with pytest.raises(UserError) as error:
        run(prepare, "enwik8")
    assert fault in str(error.value) and "by hand, or use --fallback pystdlib" in str(error.value)
    assert sum(path.stat().st_size for path in data_dir.iterdir()) < 1_000


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress), (".zip", zipped)])
def test_a_file_that_unpacks_to_more_than_a_text_can_is_refused(refused, tmp_path, suffix, pack, monkeypatch):
    monkeypatch.setattr(reading, "SMALL", 1 << 20)
    monkeypatch.setattr(reading, "CHUNK", 1 << 16)
    (tmp_path / f"bomb{suffix}").write_bytes(pack(bytes(5 << 20)))
    line = refused(prepare, "mine", "--source", tmp_path / f"bomb{suffix}")
    assert " unpacks to more than 1," in line and line.endswith(" bytes: give a file with the text alone")
    publish(monkeypatch)
    assert " unpacks to more than 20,004 bytes" in refused(prepare, "enwik8", "--source", tmp_path / f"bomb{suffix}")


def test_without_a_network_the_refusal_names_the_remedies(refused, data_dir, monkeypatch):
    publish(monkeypatch)
    line = refused(prepare, "enwik8")
    assert line.startswith("http://127.0.0.1:9/enwik8.zip cannot be downloaded (") and "refused): " in line
    assert f"put the file at {data_dir / 'enwik8.zip'} by hand, or use --fallback pystdlib" in line


@pytest.fixture
def small_stdlib(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "abc.py").write_bytes(TEXT)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    monkeypatch.setattr(reading, "PYSTDLIB_BYTES", 10_000)


@pytest.mark.parametrize("url", ["/absent.zip", None])
def test_fallback(run, data_dir, server, small_stdlib, monkeypatch, url):
    publish(monkeypatch, **{"url": server.url + url} if url else {})
    folder, err = run(prepare, "enwik8", "--fallback", "pystdlib", "--title", "enwik8", "--out", data_dir / "else")
    assert folder == data_dir / "pystdlib" and Corpus.open(folder).title.startswith("Python 3.")
    assert "cannot be downloaded" in err and "preparing pystdlib instead" in err
    assert [path.name for path in data_dir.iterdir()] == ["pystdlib"]


def test_fallback_is_not_taken_where_the_text_is_there(run, refused, data_dir, enwik8):
    folder, _ = run(prepare, "enwik8", "--fallback", "pystdlib")
    assert folder == data_dir / "enwik8"
    shutil.rmtree(folder)
    (data_dir / "enwik8.zip").write_bytes(ZIP[:-100])  # a damaged file to replace, not an unavailable text
    assert "is not a complete .zip file" in refused(prepare, "enwik8", "--fallback", "pystdlib")
