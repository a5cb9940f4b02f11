"""Hypothesis on the readers: whatever a file holds, it is read back exactly or refused with one sentence."""

import json
import os
from pathlib import Path

import pytest
import typer.main
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spd_calib.cli.main import app
from spd_calib.cli.options import section
from spd_calib.errors import InputError
from spd_calib.formats.files import FORMATS, dumps, read

RESULTS = Path(__file__).parent.parent / "results"
VALID = {
    "profile": RESULTS / "demo/profile.json",
    "plan": RESULTS / "demo/plan.json",
    "results": RESULTS / "demo/results.json",
}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner))
# tmp_path is shared by the examples of a test: each overwrites the one file
# FUZZ_EXAMPLES: how many a test; make fuzz sets it
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "100")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def places(value, here=()):
    """The path of every value in a JSON document, the whole's own excepted."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*here, key)
        yield from places(inner, (*here, key))


def read_or_refuse(name: str, path: Path, content: bytes):
    """What the reader makes of `content`: the document, or None with a refusal that names the file in one line."""
    path.write_bytes(content)
    try:
        return read(FORMATS[name], path)
    except InputError as e:
        refusal = str(e)
    assert str(path) in refusal and "\n" not in refusal
    return None


@FUZZ
@given(content=st.binary() | JSON.map(lambda v: json.dumps(v).encode()))
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_junk_is_refused(tmp_path, name, content):
    assert read_or_refuse(name, tmp_path / "f.json", content) is None


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("name", sorted(VALID))
def test_a_changed_file_is_refused_or_read_exactly(tmp_path, name, data):
    """Nothing is half accepted: what is read and written again holds what was in the file, number for number."""
    document = json.loads(VALID[name].read_text())
    *outer, key = data.draw(st.sampled_from(list(places(document))))
    part = document
    for step in outer:
        part = part[step]
    if data.draw(st.booleans()):
        part[key] = data.draw(JSON)
    elif isinstance(part, list):
        part.append(part[key])
    else:
        part[data.draw(st.text(max_size=8))] = part.pop(key)
    found = read_or_refuse(name, tmp_path / "f.json", json.dumps(document).encode())
    if found is not None:
        again = json.loads(dumps(found))
        assert dumps(read_or_refuse(name, tmp_path / "f.json", dumps(found).encode())) == dumps(found)
        for place in places(document):
            before, after = document, again
            for step in place:
                before, after = before[step], after[step]
            if not isinstance(before, dict | list):
                assert before == after


@FUZZ
@given(version=SCALARS.filter(lambda v: v != 1 or v is True))
@pytest.mark.parametrize("name", sorted(VALID))
def test_any_other_version_is_refused(tmp_path, name, version):
    document = {**json.loads(VALID[name].read_text()), "version": version}
    assert read_or_refuse(name, tmp_path / "f.json", json.dumps(document).encode()) is None


@FUZZ
@given(content=st.binary() | JSON.map(lambda v: yaml.safe_dump({"plan": v}).encode()))
def test_a_recipe_is_understood_or_refused(tmp_path, content):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    context = typer.Context(typer.main.get_command(app).commands["plan"])
    try:
        taken = section(path, "plan", context)
    except InputError as e:
        taken, refusal = {}, str(e)
        assert str(path) in refusal and "\n" not in refusal
    assert set(taken) <= {p.name for p in context.command.params}


@pytest.mark.parametrize("content", [b"?", b"1: {}", b'"a\\nb": {}', b"2020-01-01: {}"])
def test_sections_of_any_name_are_told_in_one_sentence(tmp_path, content):
    """Found by `make fuzz`: keys of YAML need not be strings."""
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"has no section 'plan'; it has .+\.$") as e:
        section(path, "plan", typer.Context(typer.main.get_command(app).commands["plan"]))
    assert "\n" not in str(e.value)
