"""The model that a file was made for: found again by its reference, and the versions that stand beside it."""

import pytest
import torch

from spd_calib.errors import InputError
from spd_calib.formats.common import ModelRef
from spd_calib.parallel import session
from spd_calib.parallel.session import check_same_model, versions

REF = ModelRef(id="m", architecture="A", num_blocks=4, config_hash="0" * 64, weight_fingerprint="1" * 64)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("architecture", "B", "architecture differs"),
        ("num_blocks", 5, "number of blocks differs"),
        ("config_hash", "2" * 64, "configuration differs"),
        ("weight_fingerprint", "2" * 64, "weights differ"),
    ],
)
def test_another_model_than_the_files(field, value, what):
    check_same_model(REF, REF.model_copy(update={"id": "elsewhere"}))
    with pytest.raises(InputError) as e:
        check_same_model(REF, REF.model_copy(update={"id": "n", field: value}))
    assert str(e.value) == (
        f"n is not the model this file was made for (m): the {what}; name the right one, or profile and plan anew."
    )


def test_the_versions_that_stand_in_files():
    import importlib.metadata

    assert versions() == {
        "spd_calib": importlib.metadata.version("spd-calib"),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }


def test_the_revision_that_a_file_names_is_looked_for(llama, monkeypatch):
    asked, real = [], session.locate
    monkeypatch.setattr(session, "locate", lambda model, revision: asked.append(revision) or real(model, revision))
    opened = session.open_session(str(llama), 2)
    expected = opened.ref.model_copy(update={"revision": "abc"})
    session.open_session(str(llama), 2, expected=expected)
    assert asked == [None, "abc"] and session.versions()["spd_calib"]
    torch.manual_seed(5)
    opened.load()
    first = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(first, torch.rand(1))  # seed 0 unless told otherwise
