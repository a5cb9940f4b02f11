"""Parameters in an error of the Python API, as the command line names them."""

import pytest

from spd_calib.cli.flags import with_flags

FLAGS = {"seq_len": "--seq-len", "data": "--data", "max_kl": "--max-kl", "strategies": "--strategy"}


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("seq_len 4096 is beyond the model's 128 tokens; lower it.", None),
        ("min_len 3 and seq_len.", "min_len 3 and --seq-len."),
        ("`data` names one text of the data twice.", "--data names one text of the data twice."),
        ("`strategies` 'hope' and `other`", "--strategy 'hope' and `other`"),
        ("/tmp/max_kl/x, a/max_kl, max_kl/a, max_kl.json", "/tmp/max_kl/x, a/max_kl, max_kl/a, max_kl.json"),
        ("no 'seq_len', `x seq_len`, my-seq_len, my_seq_len", "no 'seq_len', `x seq_len`, my-seq_len, my_seq_len"),
        ("(max_kl, seq_len)", "(--max-kl, --seq-len)"),
        ("", ""),
    ],
)  # fmt: skip
def test_names_of_parameters_become_flags(message, shown):
    assert with_flags(message, FLAGS) == (shown if shown is not None else message.replace("seq_len", "--seq-len"))


def test_a_command_names_its_options_and_python_its_parameters(spd, llama, text, tmp_path):
    from spd_calib import TextSelection, profile
    from spd_calib.errors import InputError

    options = ("--tp", 2, "--data", text, "--seq-len", 4096, "-o", tmp_path / "p.json")
    outcome = spd("profile", llama, *options)
    assert outcome.code == 2 and "--seq-len 4096 is beyond the model's 128 tokens" in outcome.err
    with pytest.raises(InputError, match="seq_len 4096 is beyond"):
        profile(str(llama), tp=2, data=str(text), text=TextSelection(seq_len=4096))
    outcome = spd("profile", llama, "--tp", 2, "--data", text, "--data", text, "-o", tmp_path / "p.json")
    assert outcome.code == 2 and outcome.err.startswith("spd-calib: --data names one text twice")
