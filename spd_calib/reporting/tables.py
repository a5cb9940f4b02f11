"""The files as tables of text: the terminal and the page show the same rows."""

from collections.abc import Mapping, Sequence

from spd_calib.formats.drops import SUBLAYERS, Drops, Point, Strategy, Sublayer
from spd_calib.formats.hardware import Hardware, Timing
from spd_calib.formats.pareto import Pareto
from spd_calib.formats.plan import Latency, Plan
from spd_calib.formats.profile import Comparison, Profile
from spd_calib.formats.results import Results
from spd_calib.parallel.quantised_sync import bytes_a_value
from spd_calib.planning.budget import describe

from .table import Table, nats, percentage_points, treatments

NAMES = {"attention": "attention", "mlp": "MLP"}


def rankings(profile: Profile) -> list[Table]:
    """Return a table for each strategy and kind of sync point that was profiled, the least sensitive block first."""
    one = _predicted if profile.fisher else _ranking
    return [
        one(profile, strategy=s, kind=kind)
        for s in profile.strategies
        for kind in profile.sync_points
        if profile.kl(s, kind)
    ]


def _predicted(profile: Profile, *, strategy: Strategy, kind: Sublayer) -> Table:
    kl = profile.kl(strategy, kind)
    return Table(
        f"{NAMES[kind]}: {strategy}, least sensitive block first, predicted",
        ["block", "KL"],
        [[str(block), nats(*kl[block])] for block in profile.ranking(strategy, "kl", kind)],
    )


def _ranking(profile: Profile, *, strategy: Strategy, kind: Sublayer) -> Table:
    by_block = profile.of(strategy, kind)
    value = profile.sensitivity(strategy, sync_point=kind)
    unit = {"accuracy": "accuracy lost", "kl": "KL added", "ppl": "perplexity"}[profile.rank_by]
    order = profile.ranking(strategy, sync_point=kind)
    rows = [
        [
            str(block),
            nats(value[block]) if profile.rank_by == "kl" else f"{value[block]:.4f}",
            nats(by_block[block].kl, by_block[block].kl_stderr),
            f"{100 * by_block[block].ppl_increase:+.2f} %",
            percentage_points(by_block[block].accuracy_drop, by_block[block].accuracy_drop_stderr),
            f"{100 * by_block[block].top1_agreement:.1f} %",
        ]
        for block in order
    ]
    columns = ["block", unit, "KL", "ppl", "top-1 lost, points", "agreement"]
    if any(m.routed_as_dense is not None for m in by_block.values()):
        columns.insert(-1, "routed as dense")
        for row, block in zip(rows, order, strict=True):
            share = by_block[block].routed_as_dense
            row.insert(-1, "" if share is None else f"{100 * share:.1f} %")
    if any(m.stopped_early for m in by_block.values()):
        from spd_calib.sensitivity.tiers import tiers  # imports torch

        tier = tiers(profile.sensitivity(strategy, "kl", kind))
        columns[-1:] = ["sequences", "tier"]
        for row, block in zip(rows, order, strict=True):
            row[-1:] = [str(by_block[block].sequences), tier[block]]
    known = ([by_block[b].kl for b in order], [by_block[b].accuracy_drop for b in order])
    if [value[b] for b in order] in known:  # the same column twice
        columns, rows = [columns[0], *columns[2:]], [[row[0], *row[2:]] for row in rows]
    cumulative = "" if profile.method == "single" else " (blocks dropped from here to the last)"
    return Table(f"{NAMES[kind]}: {strategy}, least sensitive block first{cumulative}", columns, rows)


def by_text(profile: Profile) -> list[Table]:
    """Return a table of the dense model on each text, and how far each text orders sync points as the mean does.

    Nothing for a profile of one text.
    """
    if not profile.text.parts:
        return []
    from scipy.stats import spearmanr

    rows = []
    for i, text in enumerate(profile.text.parts):
        dense = profile.baseline.per_text[i]
        correlations = []
        for s in profile.strategies:
            own = [(m.per_text[i].kl, m.kl) for m in profile.measurements if m.strategy == s]
            if f := profile.fisher:
                own = [(f.per_text[i].of(t[0])[0], f.of(t[0])[0]) for t in f.terms if len(t) == 1]
            correlations.append(f"{spearmanr(own).statistic:.2f}" if len(own) > 2 else "")
        cells = [text.source, str(text.sequences), f"{dense.ppl:.2f}", f"{100 * dense.top1_accuracy:.1f} %"]
        rows.append([*cells, *correlations])
    return [
        Table(
            "text by text: the dense model; Spearman's rank correlation of each text's KLs with their mean's",
            ["text", "sequences", "ppl", "top-1", *profile.strategies],
            rows,
        )
    ]


def verified_by_text(plan: Plan) -> list[Table]:
    """Return a table of what the whole plan costs on each text; nothing where the profile is of one."""
    v = plan.verified
    if not v.per_text:
        return []
    rows = [[text.source, *_costs(one)] for text, one in zip(v.text.parts, v.per_text, strict=True)]
    return [Table("verified, text by text", ["text", "KL", "ppl", "top-1 lost, points"], rows)]


def _costs(measured: Comparison) -> list[str]:
    return [
        nats(measured.kl, measured.kl_stderr),
        f"{100 * measured.ppl_increase:+.2f} %",
        percentage_points(measured.accuracy_drop, measured.accuracy_drop_stderr),
    ]


def blocks(plan: Plan) -> Table:
    """Return the plan block by block."""
    mlps = any(
        b.mlp_kl is not None or b.mlp_strategy != Strategy.KEEP_SYNC or b.mlp_sync_bits or b.prefill
        for b in plan.blocks
    )
    columns = ["block", "strategy", *(["MLP"] if mlps else []), "KL alone", *(["MLP alone"] if mlps else []), "why"]
    rows = []
    for b in plan.blocks:
        kls = ["" if kl is None else nats(kl) for kl in (b.kl, b.mlp_kl)]
        attention, mlp = treatments(b)
        words = [str(b.index), attention]
        rows.append([*words, mlp, *kls, b.reason] if mlps else [*words, kls[0], b.reason])
    title = f"plan for {plan.model.id} at TP {plan.tensor_parallel.size}, asked for: {describe(plan.budget)}"
    return Table(title, columns, rows, 3 if mlps else 2)


def whole_plan(plan: Plan) -> Table:
    """Return what the whole plan costs as predicted and as verified, one above the other."""
    p, v = plan.predicted, plan.verified
    columns = ["", "KL", "ppl", "top-1 lost, points"]
    served = " (the second half of each sequence, as it is served)" if v.as_served else ""
    predicted = [
        "expected of the recovered model" if plan.recovered_from else "predicted from the profile",
        nats(p.kl),
        "" if p.ppl_increase is None else f"{100 * p.ppl_increase:+.2f} %",
        "" if p.accuracy_drop is None else f"{100 * p.accuracy_drop:+.2f}",
    ]
    verified = [f"verified, held-out text{served}", *_costs(v)]
    if v.routed_as_dense is not None:
        columns, predicted = [*columns, "routed as dense"], [*predicted, ""]
        verified = [*verified, f"{100 * v.routed_as_dense:.1f} %"]
    return Table("the whole plan", columns, [predicted, verified])


def task_losses(plan: Plan) -> str:
    """Return a sentence on the accuracy lost on lm-eval tasks; '' where it was not measured."""
    v = plan.verified
    if not v.task_accuracy_drop:
        return ""
    lost = [f"{t} {percentage_points(d, v.task_accuracy_drop_stderr[t])}" for t, d in v.task_accuracy_drop.items()]
    return "lm-eval accuracy lost on documents not used to choose, points: " + ", ".join(lost)


def saving(plan: Plan) -> str:
    """Return in a sentence how many all-reduces are gone, how many are left, and how many of these are quantised."""
    if not plan.in_two_phases:
        return _saving(plan, plan.drops)
    return f"prefill: {_saving(plan, plan.by_phase.prefill)}; decoding: {_saving(plan, plan.by_phase.decode)}"


def _saving(plan: Plan, drops: Drops) -> str:
    n, m = (len(drops.blocks(sublayer)) for sublayer in SUBLAYERS)
    before = 2 * len(plan.blocks)
    what = f"{n} of {len(plan.blocks)} attention all-reduces"
    if m:
        what += f" and {m} of {len(plan.blocks) - 1} of the MLPs"
    said = f"{what} dropped: {before} a forward and rank become {before - n - m}"
    if replicated := drops.replicated:
        said += f"; heads of other ranks replicated in {len(replicated)} blocks"
    if not (quantised := drops.bits):
        return said
    share = _sent(plan, drops) / (before * bytes_a_value(None))
    return f"{said}, {len(quantised)} of them quantised; {100 * share:.0f} % of the bytes of all at 16 bits a value"


def _sent(plan: Plan, drops: Drops) -> float:
    """Return the bytes of a value in all syncs' messages together.

    Behind a norm (a predictor scales what it makes of the own partial sum) a deferred sum travels beside the next one.
    """
    sent, sums = 0.0, 1
    for block in plan.blocks:
        for sublayer, predictor in zip(SUBLAYERS, (block.compensation, block.mlp_compensation), strict=True):
            point = Point(block.index, sublayer)
            if point not in drops:
                sent, sums = sent + sums * bytes_a_value(drops.at(point).bits), 1
            elif predictor is not None and predictor.scaled:
                sums += 1
    return sent


def pareto(front: Pareto) -> Table:
    """Return the cheapest set of every size, one a row."""
    phases = list(front.points[0].saved)
    return Table(
        f"the cheapest set of every size; the knee is at {front.knee}",
        ["drops", "KL predicted", "measured", *[f"{phase} saved" for phase in phases], "dropped beyond those above"],
        [
            [
                str(p.drops),
                nats(p.predicted_kl),
                "" if p.measured_kl is None else nats(p.measured_kl),
                *[f"{100 * p.saved[phase]:.1f} %" for phase in phases],
                _beyond(p.dropped, front.points[i - 1].dropped if i else []),
            ]
            for i, p in enumerate(front.points)
        ],
    )


def compared(found: Mapping[str, Comparison]) -> Table:
    """Return what the plan and the baseline sets of its size cost, by name, one a row."""
    return Table(
        "the plan and baseline sets of its size, on the calibration text",
        ["set", "KL", "ppl", "top-1 lost, points"],
        [
            [name, nats(m.kl, m.kl_stderr), f"{100 * m.ppl_increase:+.2f} %", f"{100 * m.accuracy_drop:+.2f}"]
            for name, m in found.items()
        ],
    )


def _beyond(dropped: Sequence[Point], before: Sequence[Point]) -> str:
    back = names([p for p in before if p not in dropped])
    return ", ".join(names([p for p in dropped if p not in before])) + (f"; not {', '.join(back)}" if back else "")


def names(points: Sequence[Point]) -> list[str]:
    """Return '3' for the attention of block 3, '3 MLP' for its MLP."""
    return [str(p).removeprefix("block ") for p in points]


def tasks(results: Results) -> Table:
    """Return every score of the dense and of the planned model, with the paired difference."""
    counts = {"attention": len(results.dropped), "MLP": len(results.mlp_dropped)}
    some = " and ".join(f"{count} {sublayer}" for sublayer, count in counts.items() if count)
    dropped = f"{some} all-reduces dropped" if some else "dense and planned"
    return Table(
        f"{dropped}, TP {results.tensor_parallel.size}",
        ["task", "metric", "docs", "dense", "planned", "planned - dense"],
        [
            [
                r.task,
                r.metric,
                str(r.documents),
                f"{r.dense:.4f}",
                f"{r.planned:.4f}",
                f"{r.difference:+.4f}" + ("" if r.difference_stderr is None else f" ± {r.difference_stderr:.4f}"),
            ]
            for r in results.tasks
        ],
        2,
    )


def latencies(found: Sequence[Latency]) -> Table:
    """Return the modelled latency of one plan, a row for each phase."""
    bits_of = list(dict.fromkeys(bits for m in found for bits in m.quantised_seconds))
    return Table(
        f"modelled latency on {found[0].hardware}, batch {found[0].batch}, context {found[0].context}: no promise",
        [
            "phase",
            "all-reduce, us",
            "of it saved",
            *[f"{'/'.join(map(str, bits_of))} bits"] * bool(bits_of),
            "dense, ms",
            "planned, ms",
            "saved",
            "ceiling: every sync point dropped",
        ],
        [
            [
                m.phase,
                f"{1e6 * m.all_reduce_seconds:.1f}",
                f"{1e6 * (m.all_reduce_seconds - m.left_seconds):.1f}",
                *["/".join(_microseconds(m.quantised_seconds.get(bits)) for bits in bits_of)] * bool(bits_of),
                f"{1e3 * m.dense_seconds:.3f}",
                f"{1e3 * m.planned_seconds:.3f}",
                f"{100 * m.saved:.1f} %",
                f"{100 * m.ceiling:.1f} %",
            ]
            for m in found
        ],
    )


def _microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e6 * seconds:.1f}"


def request(plan: Plan) -> list[Table]:
    """Return a table of what a whole request takes, with one choice for both phases and with one for each.

    Nothing where the plan is for no request.
    """
    r = plan.request
    if r is None:
        return []
    of = {"dense": r.dense_seconds, "one choice for both phases": r.one_choice_seconds,
          "a choice for each": r.two_choices_seconds, "as planned": r.planned_seconds}  # fmt: skip
    return [
        Table(
            f"a request of {r.prompt} + {r.new_tokens} tokens, batch {r.batch}, modelled on {r.hardware}",
            ["", "ms", "saved"],
            [[what, f"{1e3 * s:.3f}", f"{100 * (1 - s / r.dense_seconds):.1f} %"] for what, s in of.items()],
        )
    ]


def hardware(measured: Hardware) -> list[Table]:
    """Return two tables of what was timed: sums over the ranks by size, and forwards."""
    ranks = f"{measured.tensor_parallel.size} ranks, {measured.backend}, {measured.device}"
    how = measured.execution.replace("_", " ").replace("cuda", "CUDA")
    what = f"step of vLLM, {how}," if measured.runtime == "vllm" else "eager forward, no serving engine,"
    gathered = {c.bytes: c.seconds for c in measured.collectives if c.method == "all_gather_and_sum"}
    quantised = {(c.bits, c.bytes): c.seconds for c in measured.collectives if c.bits}
    bits_of = sorted({bits for bits, _ in quantised}, reverse=True)
    sums = [
        [
            f"{c.bytes}",
            _spread(c.seconds, 1e6),
            *([_spread(gathered[c.bytes], 1e6)] if gathered else []),
            *[_spread(quantised[b, c.bytes], 1e6) if (b, c.bytes) in quantised else "" for b in bits_of],
        ]
        for c in measured.collectives
        if c.method == "all_reduce"
    ]
    dense = {(s.phase, s.batch, s.tokens): s.seconds.median for s in measured.steps if s.blocks == "dense"}
    steps = [
        [
            s.phase,
            f"{s.batch} x {s.tokens}",
            s.blocks.replace("_", " "),
            str(s.dropped),
            _spread(s.seconds, 1e3),
            f"{100 * s.seconds.median / dense[s.phase, s.batch, s.tokens]:.1f} %",
        ]
        for s in measured.steps
    ]
    return [
        Table(
            f"sum over {ranks}: median (10 % to 90 %), microseconds",
            ["bytes", "all-reduce", *(["all-gather and sum"] if gathered else []), *[f"{b} bits" for b in bits_of]],
            sums,
        ),
        Table(
            f"{what} on {ranks}: median (10 % to 90 %), milliseconds",
            ["phase", "batch", "sync points", "dropped", "time", "of dense"],
            steps,
            3,
        ),
    ]


def _spread(seconds: Timing, unit: float) -> str:
    return f"{seconds.median * unit:.1f} ({seconds.p10 * unit:.1f} to {seconds.p90 * unit:.1f})"
