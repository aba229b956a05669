"""Sealed JSON files: whatever happens to one, it is refused or says what was written."""

import json
import math
from typing import Annotated, TypedDict

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoe_dropout.files import DEEPEST, parse_json
from smoe_dropout.options import ConfigError
from utils import documents

REMEDY = "make it again"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
CONTENTS = st.dictionaries(st.text().filter(lambda name: name not in documents.MARKS), VALUES, max_size=6)


class Schema(TypedDict):
    steps: Annotated[int, msgspec.Meta(ge=0)]
    seconds: float


def read(path, schema=dict):
    return documents.read(path, schema, REMEDY)


def plain(content):
    """The content as JSON can say it."""
    return json.loads(json.dumps(documents.finite(content)))


@given(content=CONTENTS)
def test_what_was_written_is_read(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("sealed") / "a.json"
    documents.write(path, content)
    assert read(path) == plain(content)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]


@given(content=CONTENTS, data=st.data())
def test_a_damaged_file_is_refused_or_says_the_same(tmp_path_factory, content, data):
    path = tmp_path_factory.mktemp("damaged") / "a.json"
    documents.write(path, content)
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytes([whole[place] ^ 1 << data.draw(st.integers(0, 7))])
    path.write_bytes(
        data.draw(st.sampled_from([whole[:place], whole[:place] + flipped + whole[place + 1 :], whole[:place] + whole[place + 1 :]]))
    )
    try:
        assert list(read(path).items()) == list(plain(content).items())
    except documents.Damaged as error:
        assert str(error).startswith(str(path)) and str(error).endswith(REMEDY)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"steps": 3, "seconds": 1e999}', "the field 'seconds' is not a finite number"),
        ('{"steps": 3, "seconds": NaN}', "the field 'seconds' is not a finite number"),
        ('{"steps": -3, "seconds": 1.5}', "the field 'steps' must be int >= 0"),
        ('{"steps": 3.0, "seconds": 1.5}', "the field 'steps' must be int, got float"),
        ('{"seconds": 1.5}', "the content lacks steps"),
        ("[1]", "is not a JSON object"),
        ("[" * (DEEPEST + 2) + "]" * (DEEPEST + 2), "is nested deeper"),
        ("[" * 100_000 + "]" * 100_000, "is nested deeper"),
        ('{"steps": 3', "is not readable as JSON"),
        (b'{"steps": "\xff"}', "is not readable as JSON"),
        ('{"format": 1, "steps": 3, "seconds": 1.5}', "does not match its checksum"),
        ('{"steps": 3, "seconds": 1.5, "sha256": "00"}', "format is None"),
        ('{"format": 2, "steps": 3, "seconds": 1.5, "sha256": "00"}', "of a later version"),
    ],
)
def test_faults_are_named(tmp_path, text, fault):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(documents.Damaged, match=fault) as refused:
        read(path, Schema)
    assert (refused.value.path, refused.value.remedy) == (path, REMEDY)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()], ids=["missing", "a folder"])
def test_no_file(tmp_path, make):
    make(tmp_path / "a.json")
    with pytest.raises(documents.Damaged, match=r"a\.json (cannot be read|is not a file)"):
        read(tmp_path / "a.json")


def test_a_file_of_an_older_version_is_validated(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"seconds": 1.5, "steps": 3}')
    assert read(path, Schema) == {"steps": 3, "seconds": 1.5}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    documents.write(path, {"steps": 1})
    with pytest.raises(TypeError):
        documents.write(path, {"steps": object()})
    (tmp_path / ".a.json.partial").mkdir()
    with pytest.raises(IsADirectoryError):
        documents.write(path, {"steps": 2})
    assert read(path) == {"steps": 1}


def test_lines(tmp_path):
    path, schema = tmp_path / "a.jsonl", TypedDict("Line", {"step": int})
    assert documents.lines(b'{"step": 1}\n{"step": 2, "loss": NaN}\n', schema, path, REMEDY)[1]["step"] == 2
    with pytest.raises(documents.Damaged, match=r"line 2.* 'step' must be int, got str"):
        documents.lines(b'{"step": 1}\n{"step": "2"}\n', schema, path, REMEDY)
    assert math.isnan(documents.lines(b'{"step": 1, "loss": NaN}', schema, path, REMEDY)[0]["loss"])


@pytest.mark.parametrize("content", [b'{"a": "\\ud800"}', b'{"a": "\\uDC00b"}', '{"a": 1}'.encode("utf-16"), b'{"a": "\xff"}'])
def test_what_is_no_text_is_refused(content):
    with pytest.raises(ConfigError, match="is not readable as JSON"):
        parse_json(content, "x.json")
    assert parse_json(b'{"a": "\\ud83d\\ude00"}', "x.json") == {"a": "\U0001f600"}
