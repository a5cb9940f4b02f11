"""The differences between two profiles or two plans, and the reasons, as `diff` tells them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from spd_calib.errors import InputError
from spd_calib.formats.common import TextRef
from spd_calib.formats.drops import SUBLAYERS, Point
from spd_calib.formats.plan import Latency, Plan
from spd_calib.formats.profile import Profile
from spd_calib.planning.budget import describe

from .agreement import Agreement, Row, agreements, measured
from .table import percentage_points, treatments

ALPHA = 0.05  # of the test whether what a drop costs depends on the data


@dataclass(frozen=True)
class Differing:
    """A line of what differs between two files."""

    what: str
    a: str
    b: str


@dataclass(frozen=True)
class ProfileDiff:
    """`p`: that no sensitivity differs between two texts, for all sync points together; None where it is not tested."""

    differing: list[Differing]
    agreements: list[Agreement]
    p: float | None
    answer: list[str]


@dataclass(frozen=True)
class OtherStrategy:
    """A sync point that two plans treat differently; what dropping it alone costs, nats a token; and why."""

    point: Point
    a: str
    b: str
    a_kl: float | None
    b_kl: float | None
    a_reason: str
    b_reason: str


@dataclass(frozen=True)
class PlanDiff:
    """`whole`: the plans' own figures, those that are the same, too."""

    differing: list[Differing]
    whole: list[Differing]
    strategies: list[OtherStrategy]
    answer: list[str]


def diff_profiles(a: Profile, b: Profile) -> ProfileDiff:
    """Return what differs between two profiles, and the answer to whether what a drop costs depends on the data.

    Raises InputError where the models have different numbers of blocks, or nothing was measured in both.
    """
    _check_blocks(a, b)
    untested = _untested(a, b)
    found = agreements(a, b, tested=not untested)
    if not found:
        raise InputError(
            "The two profiles measured no sync point under the same strategy; profile again with the same sync points "
            "and strategies."
        )
    aspects = {
        **_of_both(a, b),
        "method": (a.method, b.method),
        "kinds of sync points": (", ".join(a.sync_points), ", ".join(b.sync_points)),
        "strategies": (", ".join(a.strategies), ", ".join(b.strategies)),
        "text": (_text(a.text), _text(b.text)),
        "sequences": (str(a.text.sequences), str(b.text.sequences)),
        "dense perplexity": (f"{a.baseline.ppl:.4g}", f"{b.baseline.ppl:.4g}"),
    }
    differing = _differing(aspects)
    rows = [(agreement, row) for agreement in found for row in agreement.rows]
    known = [row.p for _, row in rows]
    p = min(1.0, len(rows) * min(v for v in known if v is not None)) if None not in known and known else None
    answer = [untested] if untested else _dependence(rows, p)
    others = [d.what for d in differing if d.what not in ("text", "sequences", "dense perplexity", "model as given")]
    if p is not None and others:
        answer.append(f"Not the text alone differs, but {', '.join(others)}, too: the text need not be the cause.")
    if p is not None and (shared := _shared_sequences(a.text, b.text)):
        answer.append(
            f"{shared} sequences are in both texts, which hides differences: give the two texts none in common."
        )
    return ProfileDiff(differing, found, p, [*answer, *map(_choices, found)])


def _untested(a: Profile, b: Profile) -> str | None:
    """Return why the standard errors cannot tell whether the data matters; None where they can."""
    if a.text.sha256 == b.text.sha256:
        return (
            "Both are of the same text: whether what a drop costs depends on it, they cannot tell. "
            "Standard errors are over its sequences, and say nothing of other differences."
        )
    if "cumulative" in (a.method, b.method) or a.recovered or b.recovered:
        return (
            "The sensitivities of a cumulative profile, or of a recovered checkpoint's, are differences of "
            "measurements, whose standard errors it does not hold: no test of whether they depend on the text."
        )
    if min(a.text.sequences, b.text.sequences) < 2:
        return "One sequence has no standard error: no test of whether what a drop costs depends on the data."
    return None


def _dependence(rows: Sequence[tuple[Agreement, Row]], p: float | None) -> list[str]:
    """Return whether what a drop costs depends on the data, in sentences: the answer, then the test behind it."""
    if p is None:
        return ["A measurement without a standard error: no test of whether what a drop costs depends on the data."]
    agreement, row = min(rows, key=lambda pair: pair[1].p)  # type: ignore[arg-type, return-value]
    most = (
        f"the {agreement.sync_point} sync point of block {row.block} under {agreement.strategy}, KL "
        f"{measured(row.a, row.a_stderr)} in A and {measured(row.b, row.b_stderr)} in B"
    )
    chance = "p < 1e-6" if p < 1e-6 else f"p = {p:.2g}"
    test = (
        f"{chance} for no difference anywhere: Welch's t, the smallest p of {len(rows)} sync points times their number "
        "(Bonferroni), which holds however their errors hang together; standard errors are over sequences."
    )
    if p < ALPHA:
        return [f"Yes, what a drop costs depends on the data: most clearly {most}.", test]
    # what a test at this level would see half the time, in shares of the KL
    critical = stats.norm.isf(ALPHA / (2 * len(rows)))
    errors = np.hypot(*np.array([[r.a_stderr, r.b_stderr] for _, r in rows], dtype=float).T)
    seen = [critical * e / (r.a + r.b) * 2 for (_, r), e in zip(rows, errors, strict=True) if r.a + r.b > 0]
    least = f" Differences below about {100 * np.median(seen):.0f} % of a KL (median) would go unseen." if seen else ""
    return [f"No evidence that what a drop costs depends on the data; the clearest difference is {most}.{least}", test]


def _choices(agreement: Agreement) -> str:
    """Return, in a sentence, for how many sizes the same sync points would be dropped."""
    sizes, others = len(agreement.rows) - 1, agreement.other_sets
    name = f"{agreement.sync_point}, {agreement.strategy}"
    said = f"{name}: the k blocks least sensitive by KL are the same for {sizes - len(others)} of {sizes} k"
    shown = [f"k = {o.size}: A takes {_list(o.only_a)}, B {_list(o.only_b)}" for o in others[:3]]
    rest = f"; and {len(others) - 3} more" if len(others) > 3 else ""
    return f"{said}{'; ' if shown else ''}{'; '.join(shown)}{rest}."


def diff_plans(a: Plan, b: Plan) -> PlanDiff:
    """Return what differs between two plans. Raises InputError where the models have different numbers of blocks."""
    _check_blocks(a, b)
    aspects = {
        **_of_both(a, b),
        "asked for": (describe(a.budget), describe(b.budget)),
        "strategies allowed": (", ".join(a.budget.strategies), ", ".join(b.budget.strategies)),
        "requires": (", ".join(a.requires) or "nothing", ", ".join(b.requires) or "nothing"),
        "predictors": tuple(p.compensation.sha256[:12] if p.compensation else "none" for p in (a, b)),
        "recovered from": tuple(p.recovered_from.id if p.recovered_from else "nothing" for p in (a, b)),
        "text verified on": (_text(a.verified.text), _text(b.verified.text)),
        "verified": tuple("as it is served" if p.verified.as_served else "in one forward" for p in (a, b)),
        "planned for": tuple(_steps(p) if p.request else "any step" for p in (a, b)),
    }
    others = [
        OtherStrategy(Point(block=x.index, sync_point=kind), of_a, of_b, *kl, x.reason, y.reason)
        for x, y in zip(a.blocks, b.blocks, strict=True)
        for kind, of_a, of_b, kl in zip(
            SUBLAYERS, treatments(x), treatments(y), ((x.kl, y.kl), (x.mlp_kl, y.mlp_kl)), strict=True
        )
        if of_a != of_b or (kind == "attention" and x.replicated != y.replicated)
    ]
    differing = _differing(aspects)
    return PlanDiff(differing, _whole(a, b), others, [_why(a, b, others=others)])


def _whole(a: Plan, b: Plan) -> list[Differing]:
    figures = [{**_figures(p), **_latencies(p.latency)} for p in (a, b)]
    names = dict.fromkeys([*figures[0], *figures[1]])
    return [Differing(name, figures[0].get(name, ""), figures[1].get(name, "")) for name in names]


def _figures(plan: Plan) -> dict[str, str]:
    p, v = plan.predicted, plan.verified
    phases = [plan.by_phase.prefill, plan.drops] if plan.in_two_phases else [plan.drops]
    return {
        "sync points dropped": _by_phase([len(drops) for drops in phases]),
        "all-reduces a forward": _by_phase([2 * len(plan.blocks) - len(drops) for drops in phases]),
        "KL predicted": f"{p.kl:.3g}",
        "KL verified": measured(v.kl, v.kl_stderr),
        "ppl predicted": "" if p.ppl_increase is None else f"{100 * p.ppl_increase:+.2f} %",
        "ppl verified": f"{100 * v.ppl_increase:+.2f} %",
        "top-1 lost, points": percentage_points(v.accuracy_drop, v.accuracy_drop_stderr),
        **{f"{task} lost, points": f"{100 * lost:+.2f}" for task, lost in v.task_accuracy_drop.items()},
    }


def _steps(plan: Plan) -> str:
    """Return what a plan's latency was modelled for: a request, or steps."""
    if (r := plan.request) is not None:
        return f"a request of {r.prompt} + {r.new_tokens} tokens, batch {r.batch}, {r.hardware}"
    return "; ".join(f"{m.phase}, batch {m.batch}, context {m.context}, {m.hardware}" for m in plan.latency) or "none"


def _by_phase(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} in prefill, {counts[1]} in decoding"


def _latencies(latency: Sequence[Latency]) -> dict[str, str]:
    return {
        f"{m.phase} saved, {m.hardware}, batch {m.batch}, context {m.context}": f"{100 * m.saved:.1f} %"
        for m in latency
    }


def _why(a: Plan, b: Plan, *, others: Sequence[OtherStrategy]) -> str:
    if not others:
        return "Both plans drop the same sync points in the same way."
    kls = [
        (left, right)
        for x, y in zip(a.blocks, b.blocks, strict=True)
        for left, right in ((x.kl, y.kl), (x.mlp_kl, y.mlp_kl))
        if left is not None and right is not None
    ]
    changed = sum(left != right for left, right in kls)
    said = f"{len(others)} sync points differ"
    numbers = f"the KLs alone that both name differ at {changed} of {len(kls)} sync points"
    if a.budget != b.budget:
        if not kls:
            return f"{said}: other budgets were asked for."
        if changed:
            return f"{said}: other budgets were asked for, and {numbers}."
        return f"{said}: other budgets were asked for, of the same sensitivities."
    if changed:
        return f"{said}: the budget is the same, {numbers}: compare the profiles."
    timed = a.request or b.request or a.budget.kind == "min_speedup"
    options = ["requests or steps to save time of"] if timed and _steps(a) != _steps(b) else []
    options += ["bits of syncs"] if _bits(a) != _bits(b) else []
    options += ["heads replicated"] if a.drops.replicated != b.drops.replicated else []
    if options:
        return f"{said}: the budget and the KLs alone are the same; other {' and '.join(options)} were asked for."
    return f"{said}: the budget and the KLs alone are the same; the text verified on, recovery or the version decided."


def _bits(plan: Plan) -> list[dict[Point, int]]:
    return [plan.by_phase.prefill.bits, plan.by_phase.decode.bits]


def _check_blocks(a: Profile | Plan, b: Profile | Plan) -> None:
    if a.model.num_blocks != b.model.num_blocks:
        raise InputError(
            f"A is of a model with {a.model.num_blocks} blocks and B of one with {b.model.num_blocks}: compare two of "
            "the same number."
        )


def _of_both(a: Profile | Plan, b: Profile | Plan) -> dict[str, tuple[str, ...]]:
    made = a.provenance, b.provenance
    names = dict.fromkeys([*made[0].versions, *made[1].versions])
    return {
        "model as given": (a.model.id, b.model.id),
        "architecture": (a.model.architecture, b.model.architecture),
        "configuration": (a.model.config_hash[:12], b.model.config_hash[:12]),
        "weights": (a.model.weight_fingerprint[:12], b.model.weight_fingerprint[:12]),
        "TP size": (str(a.tensor_parallel.size), str(b.tensor_parallel.size)),
        "seed": (str(made[0].seed), str(made[1].seed)),
        "device": (made[0].device, made[1].device),
        "dtype": (made[0].dtype, made[1].dtype),
        **{f"version of {n}": tuple(m.versions.get(n, "not named") for m in made) for n in names},
    }


def _differing(aspects: Mapping[str, tuple[str, ...]]) -> list[Differing]:
    return [Differing(what, *pair) for what, pair in aspects.items() if pair[0] != pair[1]]


def _text(text: TextRef) -> str:
    return f"{text.source}, from {text.first}, {text.tokens} tokens, {text.sha256[:12]}"


def _shared_sequences(a: TextRef, b: TextRef) -> int:
    return sum(_shared(x, y) for x in a.each for y in b.each)


def _shared(a: TextRef, b: TextRef) -> int:
    if any(getattr(a, name) != getattr(b, name) for name in ("source", "column", "seq_len", "min_len", "pack")):
        return 0
    return max(0, min(a.first + a.sequences, b.first + b.sequences) - max(a.first, b.first))


def _list(blocks: Sequence[int]) -> str:
    return ", ".join(map(str, blocks))
