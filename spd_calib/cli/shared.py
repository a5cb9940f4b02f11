"""What several commands do between their options and the core."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spd_calib.errors import InputError
from spd_calib.formats.common import Strategy
from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Profile
from spd_calib.parallel.session import Session
from spd_calib.planning.budget import blocks, fraction
from spd_calib.planning.plan import HeldOutText
from spd_calib.report.table import nats
from spd_calib.sensitivity.averaging import joint_ref
from spd_calib.sensitivity.documents import TEXT
from spd_calib.sensitivity.metrics import Tally
from spd_calib.sensitivity.profile import Trial
from spd_calib.sensitivity.text import Text, TextOptions, further, load_texts


def load_text_for(
    session: Session,
    data: str,
    seq_len: int | None,
    min_len: int | None,
    max_samples: int,
    verify_samples: int,
    pack: bool,
    skip: int = 0,
    column: str = TEXT,
) -> Text:
    """Return calibration and verification sequences of one text, as `load_texts_for`."""
    return load_texts_for(session, [data], seq_len, min_len, max_samples, verify_samples, pack, skip, column)[0]


def load_texts_for(
    session: Session,
    data: Sequence[str],
    seq_len: int | None,
    min_len: int | None,
    max_samples: int,
    verify_samples: int,
    pack: bool,
    skip: int = 0,
    column: str = TEXT,
) -> list[Text]:
    """Return calibration and verification sequences for a session's model, none in two texts.

    Raises InputError for lengths the model cannot read.
    """
    if seq_len is not None and seq_len > session.max_length:
        raise InputError(f"--seq-len {seq_len} is beyond the model's {session.max_length} tokens; lower it.")
    seq_len = seq_len or min(2048, session.max_length)
    if min_len is not None and min_len > seq_len:
        raise InputError(f"--min-len {min_len} is more than --seq-len {seq_len}: no document would be left.")
    common = TextOptions("", seq_len, min_len or seq_len, max_samples, verify_samples, pack, skip=skip, column=column)
    return load_texts([replace(common, source=resolve_data(d), name=d) for d in data], session.tokenizer)


def reload_texts(session: Session, profile: Profile) -> list[Text]:
    """Return the very sequences a profile speaks of, text by text. Raises InputError where one has changed since."""
    refs = list(zip(profile.text.each, profile.verify_text.each, strict=True))
    options = [
        TextOptions(
            resolve_data(measured.source),
            measured.seq_len,
            measured.min_len,
            measured.sequences,
            kept.sequences,
            measured.pack,
            name=measured.source,
            skip=measured.first,
            column=measured.column,
        )
        for measured, kept in refs
    ]
    texts = load_texts(options, session.tokenizer)
    for text, (measured, kept) in zip(texts, refs, strict=True):
        if (text.calibration_ref().sha256, text.verification_ref().sha256) != (measured.sha256, kept.sha256):
            raise InputError(
                f"{measured.source} or the tokenizer has changed since the profile was made; profile again."
            )
    return texts


def further_texts(session: Session, texts: Sequence[Text], times: int) -> HeldOutText | None:
    """Return the `times`-th further lot to verify on, of every text; None where one of them is at its end."""
    lots = further(texts, times, session.tokenizer)
    if lots is None:
        return None
    return HeldOutText([lot.verification for lot in lots], joint_ref([lot.verification_ref() for lot in lots]))


def resolve_data(data: str) -> str:
    """'demo' is the calibration text this package ships."""
    if data != "demo":
        return data
    from spd_calib.demo.assets import data_file

    return str(data_file("calibration"))


def note_of(trial: Trial, tally: Tally | None) -> str:
    what = f"block {trial.block} {'MLP ' if trial.sync_point == 'mlp' else ''}{trial.strategy}"
    return what if tally is None else f"{what}: KL {nats(tally.kl())}"


def budget_from(
    profile: Profile,
    max_kl: str | None,
    max_ppl_increase: str | None,
    max_accuracy_drop: str | None,
    max_logprob_diff: str | None,
    drop: str | None,
    tau1: float | None,
    tau2: float | None,
    strategies: list[str] | None,
    min_speedup: str | None = None,
    each_text: bool = False,
) -> Budget:
    """The one budget given. Raises InputError for none, two, or one that makes no sense."""
    given = {
        "--max-kl": max_kl,
        "--max-ppl-increase": max_ppl_increase,
        "--max-accuracy-drop": max_accuracy_drop,
        "--max-logprob-diff": max_logprob_diff,
        "--min-speedup": min_speedup,
        "--drop": drop,
        "--tau1": tau1,
    }
    chosen = [option for option, value in given.items() if value is not None]
    if len(chosen) != 1:
        found = "none is" if not chosen else f"{' and '.join(chosen)} are"
        raise InputError(f"Give exactly one budget of {', '.join(given)}; {found} given.")
    if (tau2 is not None) != (tau1 is not None):
        raise InputError("--tau1 and --tau2 go together: the paper's rule has two thresholds.")
    if tau1 is not None and tau2 is not None and tau2 < tau1:
        raise InputError(f"--tau2 {tau2} is below --tau1 {tau1}; swap them.")
    if each_text and (chosen[0] in ("--drop", "--tau1", "--min-speedup") or not profile.text.parts):
        raise InputError(
            "--each-text needs a budget of a cost, such as --max-kl, and a profile of several --data; leave it out."
        )
    if wrong := [s for s in strategies or [] if s not in list(Strategy)]:
        raise InputError(f"--strategy {wrong[0]!r} is none of {', '.join(Strategy)}.")
    usable = list(dict.fromkeys(map(Strategy, strategies or profile.strategies)))
    option = chosen[0]
    if option == "--drop":
        points = {
            (kind, block) for s in profile.strategies for kind in profile.sync_points for block in profile.kl(s, kind)
        }
        what = "blocks" if profile.sync_points == ["attention"] else "sync points"
        wanted, settled = blocks(str(drop), len(points) + len(profile.settled), what), len(profile.settled)
        if wanted < settled:
            raise InputError(f"--drop {drop} is less than the {settled} {what} that the recovered checkpoint drops.")
        return Budget(kind="drop", value=wanted, strategies=usable)
    if option == "--tau1" and profile.recovered:
        raise InputError("--tau1 says what to recover, and this checkpoint is recovered; give another budget.")
    if option == "--tau1":
        return Budget(kind="tau", value=float(tau1 or 0), tau2=tau2, strategies=usable)
    kind = option[2:].replace("-", "_")
    value = fraction(str(given[option]), option)
    return Budget(kind=kind, value=value, strategies=usable, each_text=each_text)  # type: ignore[arg-type]


def resolve_tasks(tasks: str, include_path: Path | None) -> tuple[list[str], Path | None]:
    """Task names, and where lm-eval finds them; 'demo' stands for the three tasks this package ships."""
    if tasks != "demo":
        return [t for t in tasks.split(",") if t], include_path
    from spd_calib.demo.assets import TASKS, tasks_dir

    return list(TASKS), tasks_dir()
