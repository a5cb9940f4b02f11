"""The wheel holds all the package needs, and works where nothing but the wheel is; versions and citation agree."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the sources and unpacked."""
    pytest.importorskip("build")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "spd_calib", source / "spd_calib", ignore=shutil.ignore_patterns("__pycache__"))
    words = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(out / "dist"), str(source)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = (out / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(out / "site")
    return out / "site"


def test_the_wheel_holds_every_file_of_the_package(unpacked):
    def files(folder: Path) -> set[Path]:
        return {p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}

    assert files(unpacked / "spd_calib") == files(ROOT / "spd_calib")
    assert (unpacked / "spd_calib/py.typed").exists()


def test_the_wheel_alone_measures_the_shipped_model_offline(unpacked, tmp_path):
    """Run from the unpacked wheel, the sources out of reach; `make release-check` runs the whole demo so."""
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    sizes = ["--seq-len", "32", "--max-samples", "2", "--verify-samples", "2", "--device", "cpu"]
    words = ["profile", "demo", "--tp", "4", "--data", "demo", *sizes, "-o", "profile.json"]
    start = "import sys, spd_calib, spd_calib.cli.main as m; print(spd_calib.__file__); m.main()"
    done = subprocess.run(
        [sys.executable, "-c", start, *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(unpacked))
    assert (tmp_path / "profile.json").exists()


def test_version_and_paper_are_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    paper = citation["preferred-citation"]
    assert paper["title"] in readme and paper["url"] in readme
    for author in paper["authors"]:
        assert f"{author['given-names']} {author['family-names']}" in readme


def test_every_dependency_is_pinned():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {re.split("==", pin)[0].lower().replace("_", "-") for pin in pins if "==" in pin}
    wanted = [*PROJECT["dependencies"], *(d for extra in PROJECT["optional-dependencies"].values() for d in extra)]
    assert {re.match(r"[\w.-]+", name)[0].lower().replace("_", "-") for name in wanted} <= pinned


def test_every_pin_installs_on_the_oldest_python_that_is_allowed():
    """A Debian 12 has Python 3.11.2: a pin that wants 3.11.5 would end its `make demo` in pip's resolver."""
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    refused = {
        pin: wanted
        for pin in pins
        if "==" in pin and (wanted := _python_of(pin.split("==")[0])) and oldest not in SpecifierSet(wanted)
    }
    assert not refused


def _python_of(name: str) -> str | None:
    """Return which Python an installed distribution asks for; None for one that is not installed here."""
    try:
        return metadata(name)["Requires-Python"]
    except PackageNotFoundError:
        return None
