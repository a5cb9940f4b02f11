"""The functions of the package: imported when they are asked for, called by keyword, telling how far they are."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest

import spd_calib
from spd_calib import Progress, RunOptions, TaskOptions, TextSelection, estimate_profile, plan, profile, recover, report
from spd_calib.errors import InputError, SpdError
from spd_calib.formats.files import dumps, read, sha256_of
from spd_calib.formats.plan import Plan
from spd_calib.formats.profile import Profile
from spd_calib.formats.results import Results, TaskResult
from spd_calib.parallel.session import Session

CPU = RunOptions(device="cpu")
SHORT = TextSelection(seq_len=16, max_samples=4, verify_samples=3)
FUNCTIONS = ("bench", "check", "estimate_profile", "evaluate", "plan", "profile", "recover", "report")


def test_importing_the_package_imports_nothing_else(tmp_path):
    code = (
        "import sys, spd_calib\n"
        "assert set(spd_calib.__all__) <= set(dir(spd_calib))\n"
        "heavy = {'torch', 'transformers', 'typer', 'pydantic', 'matplotlib', 'lm_eval'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from spd_calib import RunOptions, report\n"
        "import spd_calib.reporting.tables, spd_calib.api.report\n"
        "assert callable(spd_calib.report) and spd_calib.report is report and callable(spd_calib.plan)\n"
        "assert 'lm_eval' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_are_keywords_beyond_the_first_two(name):
    function = getattr(spd_calib, name)
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) <= 2
    assert set(kinds[2:]) <= {inspect.Parameter.KEYWORD_ONLY} and function.__doc__ and "Raises" in function.__doc__


def test_every_name_is_there_and_no_other():
    assert set(FUNCTIONS) <= set(spd_calib.__all__)
    for name in spd_calib.__all__:
        assert getattr(spd_calib, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'profil'"):
        _ = spd_calib.profil


def test_a_call_gives_what_the_command_writes(spd, llama, text, tmp_path, monkeypatch):
    sizes = ("--seq-len", 16, "--max-samples", 4, "--verify-samples", 3, "--device", "cpu")
    assert spd("profile", llama, "--tp", 2, "--data", text, *sizes, "-o", tmp_path / "p.json").code == 0
    assert spd("plan", tmp_path / "p.json", "--drop", 2, "--device", "cpu", "-o", tmp_path / "plan.json").code == 0
    monkeypatch.setattr(sys, "argv", ["notebook.py"])
    profiled = profile(str(llama), tp=2, data=str(text), text=SHORT, run=CPU)
    planned = plan(profiled, drop=2, run=CPU)
    for kind, made, name in ((Profile, profiled, "p"), (Plan, planned, "plan")):
        written = read(kind, tmp_path / f"{name}.json")
        assert made.provenance.command == "from Python" and written.provenance.command.startswith("spd-calib p")
        assert made == written.model_copy(update={"provenance": made.provenance})


def test_progress_is_told_what_comes_and_what_is_done(llama, text, capfd):
    for method, steps in (("single", 8), ("cumulative", 8), ("fisher", None)):
        said, expected, done = [], [], []
        progress = Progress(say=said.append, expect=expected.append, step=done.append)
        options = {"tp": 2, "data": str(text), "text": SHORT, "method": method, "run": CPU}
        strategies = ["block_drop"] if method == "fisher" else None
        profile(str(llama), **options, strategies=strategies, progress=progress)
        assert sum(expected) == len(done) and (steps is None or len(done) == steps)
        assert any("4 sequences to measure on, 3 kept for verifying" in s for s in said)
    assert capfd.readouterr() == ("", "")  # nothing is printed


def test_an_estimate_has_the_same_arguments_and_measures_nothing(llama, text):
    said: list[str] = []
    own = set(inspect.signature(profile).parameters) - {"journal"}
    assert own == set(inspect.signature(estimate_profile).parameters)
    tasks = TaskOptions.of("demo")
    found = estimate_profile(
        str(llama), tp=2, data=str(text), text=SHORT, tasks=tasks, run=CPU, progress=Progress(say=said.append)
    )
    assert found.batches == 1 and found.tokens == 64 and found.seconds > 0
    assert said[-2].startswith("would be run: 8 experiments and the dense model, on 1 batches, 64 tokens")
    assert said[-1].startswith("not counted: the lm-eval tasks") and "each of 8 experiments" in said[-1]
    said.clear()
    estimate_profile(
        str(llama), tp=2, data=str(text), text=SHORT, method="fisher", run=CPU, progress=Progress(say=said.append)
    )
    assert "one pass forward and backward with" in said[-1]


def test_a_journal_goes_on_and_stays_and_is_let_go(llama, text, tmp_path, monkeypatch):
    journal = tmp_path / "j"
    options = {"tp": 2, "data": str(text), "text": SHORT, "run": CPU, "journal": journal}

    class Stop(Exception):
        pass

    def stop(note: str) -> None:
        if note.startswith("block 2"):
            raise Stop

    with pytest.raises(Stop):
        profile(str(llama), **options, progress=Progress(step=stop))
    said: list[str] = []
    resumed = profile(str(llama), **options, progress=Progress(say=said.append))
    assert any("measurements are finished" in s for s in said) and journal.exists()
    assert resumed == profile(str(llama), tp=2, data=str(text), text=SHORT, run=CPU)
    monkeypatch.setattr(Session, "load", lambda *_, **__: pytest.fail("no weight need be read to refuse a journal"))
    with pytest.raises(InputError, match="whose batch size differs"):
        profile(str(llama), **options | {"run": RunOptions(device="cpu", batch_size=2)})


def test_errors_name_parameters(llama, text):
    common = {"tp": 2, "data": str(text), "text": SHORT, "run": CPU}
    for changes, words in (
        ({"method": "fast"}, "`method` 'fast' is none of single, cumulative, fisher."),
        ({"strategies": ["keep_sync"]}, "`strategies` 'keep_sync' cannot be measured"),
        ({"sync_points": ["both"]}, "sync_points 'both' is neither"),
        ({"sync_points": []}, "sync_points '' is neither"),
        ({"rank_by": "luck"}, "rank_by 'luck' is none of accuracy, kl, ppl."),
        ({"confidence": 0.95, "method": "cumulative"}, "`confidence` belongs to `method` single, not to cumulative"),
        ({"confidence": 2}, "`confidence` 2 is no probability"),
        ({"confidence": 0.9, "data": [str(text), "demo"]}, "Several texts are measured to their end"),
        ({"run": RunOptions(dtype="int8")}, "`dtype` 'int8' is none of float32, bfloat16, float16."),
        ({"data": ["demo", "demo"]}, "`data` names one text twice"),
        ({"text": TextSelection(seq_len=8, min_len=9)}, "min_len 9 is more than seq_len 8"),
    ):
        with pytest.raises(InputError) as e:
            profile(str(llama), **common | changes)
        assert words in str(e.value) and "--" not in str(e.value)
    with pytest.raises(SpdError, match="best plan found"):
        plan(profile(str(llama), **common), max_kl=1e-9, run=CPU)


def test_a_report_of_documents_is_that_of_their_files(profile_file, tmp_path):
    (tmp_path / "profile.json").write_text(profile_file.read_text())
    profiled = read(Profile, profile_file)
    planned = plan(profiled, drop=2, run=CPU)
    (tmp_path / "plan.json").write_text(dumps(planned))
    task = TaskResult(
        task="t", metric="acc", higher_is_better=True, dense=0.5, planned=0.25, difference=-0.25,
        difference_stderr=0.1, documents=8,
    )  # fmt: skip
    results = Results(
        model=planned.model, tensor_parallel=planned.tensor_parallel, plan_sha256=sha256_of(tmp_path / "plan.json"),
        dropped=[0], limit=None, tasks=[task], provenance=planned.provenance,
    )  # fmt: skip
    (tmp_path / "results.json").write_text(dumps(results))
    of_files, of_documents = report(tmp_path), report(profiled, plan=planned, results=results)
    assert of_files.html == of_documents.html and of_files.png() == of_documents.png()
    assert [s.name for s in of_documents.left_out] == ["latency"]
    stale = report(profiled, plan=planned, results=results.model_copy(update={"plan_sha256": "0" * 64}))
    assert [s.name for s in stale.left_out] == ["evaluation", "latency"]
    other = planned.model_copy(update={"model": planned.model.model_copy(update={"config_hash": "0" * 64})})
    with pytest.raises(InputError, match="the plan is a plan of another model than the profile"):
        report(profiled, plan=other)
    for arguments in ({"plan": tmp_path / "plan.json"},):
        with pytest.raises(InputError, match="not with a file"):
            report(profiled, **arguments)
    with pytest.raises(InputError, match="give the profile as such"):
        report(tmp_path, results=results)


def test_two_documents_are_compared_as_their_files_are(profile_file, tmp_path):
    from dataclasses import asdict

    from spd_calib.api.diff import diff

    profiled = read(Profile, profile_file)
    assert json.dumps(asdict(diff(profiled, profile_file))) == json.dumps(asdict(diff(profile_file, profiled)))
    with pytest.raises(InputError, match="A is a profile and B a plan"):
        diff(profiled, plan(profiled, drop=2, run=CPU))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tp": 2.5}, "`tp` 2.5 is no whole number; give one."),
        ({"tp": 0}, "`tp` 0 is too small; give 1 or more."),
        ({"text": TextSelection(max_samples=0)}, "`max_samples` 0 is too small; give 1 or more."),
        ({"text": TextSelection(verify_samples=-1)}, "`verify_samples` -1 is too small; give 1 or more."),
        ({"text": TextSelection(seq_len=1, pack=True)}, "`seq_len` 1 is too small; give 2 or more."),
        ({"run": RunOptions(batch_size=0)}, "`batch_size` 0 is too small; give 1 or more."),
        ({"data": []}, "`data` names no text; give one, such as a file."),
    ],
)
def test_numbers_that_the_commands_refuse_are_refused_in_a_sentence(llama, text, options, words):
    with pytest.raises(InputError) as e:
        profile(str(llama), **{"tp": 2, "data": str(text), "text": SHORT, "run": CPU} | options)
    assert str(e.value) == words


def test_numbers_of_numpy_and_paths_are_what_they_say(llama, text):
    profiled = profile(llama, tp=np.int64(2), data=text, text=SHORT, run=CPU)
    assert profiled.measurements == profile(str(llama), tp=2, data=str(text), text=SHORT, run=CPU).measurements
    quantised = plan(profiled, drop=2, sync_bits=np.int64(8), run=CPU)
    assert quantised.requires == ["quantised_sync"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_rank": -1}, "`max_rank` -1 is too small"),
        ({"steps": -1}, "`steps` -1 is too small"),
        ({"final_steps": -1}, "`final_steps` -1 is too small"),
        ({"exchange": float("nan")}, "`exchange` nan is no share"),
        ({"rate": 1e300}, "no learning rate"),
    ],
)
def test_numbers_that_recovery_refuses(options, words, tmp_path):
    with pytest.raises(InputError, match=words):
        recover(tmp_path / "plan.json", tmp_path / "out", data="demo", **options)
