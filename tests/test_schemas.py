"""The JSON Schemas in docs/ are those of the code, and accept what the code writes."""

import json
from pathlib import Path

import jsonschema
import pytest

from spd_calib.formats.files import FORMATS, schema

SCHEMAS = Path(__file__).parent.parent / "docs/schemas"


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_the_schema_in_docs_is_that_of_the_code(name):
    assert (SCHEMAS / f"{name}.schema.json").read_text() == schema(name), "run `make schemas`"


def test_a_written_profile_is_valid_by_its_schema(profile_file):
    document = json.loads(profile_file.read_text())
    rules = json.loads((SCHEMAS / "profile.schema.json").read_text())
    jsonschema.validate(document, rules)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "method": "guess"}, rules)
