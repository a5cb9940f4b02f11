"""Profiling and planning again after `recover`: against the dense model, figures made by a loop of this file's own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spd_calib import RunOptions, profile
from spd_calib.api.generate import generate
from spd_calib.errors import InputError
from spd_calib.formats.drops import NOTHING_DROPPED, Drops, Point, Strategy
from spd_calib.formats.files import dumps, read
from spd_calib.formats.plan import Plan
from spd_calib.formats.profile import Profile
from spd_calib.models.plan_files import load_plan
from spd_calib.parallel.session import open_session
from spd_calib.planning.machine_latency import ATTAINED
from spd_calib.planning.model_sizes import ModelSizes, predictor_weights

KEEP, DROP, PLAIN = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP, Strategy.PLAIN_DROP
FIT = ("--seq-len", 24, "--max-samples", 20, "--verify-samples", 6, "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama, text) -> Path:
    """A checkpoint whose block 1 was distilled and given predictors, from a plan that drops blocks 1 and 2."""
    from spd_calib import RunOptions, TextSelection, plan, profile, recover

    path, run = tmp_path_factory.mktemp("recovered"), RunOptions(device="cpu")
    data = str(path / "all.jsonl")
    Path(data).write_text(Path(text).read_text())
    profiled = profile(str(llama), tp=4, data=data, text=TextSelection(24, None, 12, 8), run=run)
    raw = json.loads(dumps(plan(profiled, drop=2, strategies=["block_drop"], run=run)))
    for block, strategy in zip(raw["blocks"], (KEEP, DROP, PLAIN, KEEP), strict=True):
        block["strategy"] = strategy
    (path / "plan.json").write_text(json.dumps(raw))
    recover(path / "plan.json", path / "out", data=data, methods=["compensation", "distillation"], tau1=0.0, tau2=0.0,
            exchange=0.0, text=TextSelection(24, None, 20, 6), steps=50, final_steps=50,
            run=RunOptions(device="cpu", batch_size=4))  # fmt: skip
    return path


def kl_by_hand(folder: Path, llama: Path, sequences: list[list[int]], drops: dict[int, Strategy]) -> float:
    """KL a token of the checkpoint with `drops` on top of its plan's, against the original in plain transformers."""
    _, planned = load_plan(folder / "plan.json")
    lm = open_session(str(folder), 4).load()
    more = Drops.of({Point(i, "attention"): strategy for i, strategy in drops.items()})
    original = AutoModelForCausalLM.from_pretrained(llama)
    total = tokens = 0.0
    for ids in sequences:
        with torch.no_grad(), lm.running(planned | more):
            p, q = original(torch.tensor([ids])).logits, lm(torch.tensor([ids]))
        p, q = (x[0, :-1].double().log_softmax(-1) for x in (p, q))
        total += (p.exp() * (p - q)).sum().item()
        tokens += len(p)
    return total / tokens


def test_every_figure_compares_with_the_model_it_was_made_from(spd, folder, llama, tmp_path) -> None:
    plan = read(Plan, folder / "out/plan.json")
    assert plan.drops == Drops.of_blocks([KEEP, DROP, PLAIN, KEEP]) and plan.compensation
    weights = [AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (llama, folder / "out")]
    assert not all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))  # it was trained

    data = folder / "all.jsonl"
    given = ("--tp", 4, "--data", data, "--max-samples", 8, "--verify-samples", 6, "--device", "cpu")
    run = spd("profile", folder / "out", *given, "-o", tmp_path / "p.json", "--sync-points", "attention,mlp")
    assert run.code == 0 and "compared with; 2 sync points stay dropped" in " ".join(run.err.split())
    assert "20 sequences are left out, since the model was fitted on them" in " ".join(run.err.split())
    profile = read(Profile, tmp_path / "p.json")
    assert profile.recovered and [(p.block, p.sync_point) for p in profile.settled] == [
        (1, "attention"), (2, "attention"),
    ]  # fmt: skip
    tried = {(m.block, m.sync_point, m.strategy) for m in profile.measurements}
    attention = {(b, "attention", s) for b in (0, 3) for s in (DROP, PLAIN)}
    assert tried == attention | {(b, "mlp", DROP) for b in range(3)}

    tokenizer = AutoTokenizer.from_pretrained(llama)
    documents = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    ids = [tokenizer(d).input_ids[:24] for d in documents]
    ids = [i for i in ids if len(i) == 24]
    measured, kept = ids[20:28], ids[28:34]  # 20 were fitted on
    assert (profile.text.first, profile.verify_text.first) == (0, 8)  # of those that are left
    alone = kl_by_hand(folder / "out", llama, measured, {})
    assert profile.recovered.alone.kl == pytest.approx(alone, rel=1e-4)
    for strategy in (DROP, PLAIN):
        by_hand = kl_by_hand(folder / "out", llama, measured, {3: strategy})
        assert profile.of(strategy)[3].kl == pytest.approx(by_hand, rel=1e-4)
        assert profile.sensitivity(strategy, "kl")[3] == pytest.approx(by_hand - alone, abs=1e-6)
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(llama)
        nll = [original(torch.tensor([i]), labels=torch.tensor([i])).loss.item() for i in measured]
    assert profile.baseline.nll == pytest.approx(sum(nll) / len(nll), rel=1e-5)

    # a plan over what is left, with the predictors beside it
    out = tmp_path / "again.json"
    run = spd("plan", tmp_path / "p.json", "--drop", 3, "--strategy", "block_drop", "-o", out, "--compare",
              "--pareto", tmp_path / "pareto.json", "--device", "cpu")  # fmt: skip
    assert run.code == 0, run.err
    new = read(Plan, out)
    drops = {b.index: b.strategy for b in new.blocks if b.strategy != KEEP}
    assert drops.pop(1) == DROP and drops.pop(2) == PLAIN and len(new.drops) == 3
    assert new.recovered_from == plan.recovered_from and new.blocks[1].compensation == plan.blocks[1].compensation
    front = json.loads((tmp_path / "pareto.json").read_text())
    assert [p["drops"] for p in front["points"]] == [2, 3, 4, 5, 6, 7]
    if not new.drops.blocks("mlp"):
        assert new.verified.kl == pytest.approx(kl_by_hand(folder / "out", llama, kept, drops), rel=1e-4)
    lm = open_session(new.model.id, 4, expected=new.model).load()
    with lm.running(load_plan(out)[1]):  # the file lies beside the new plan
        pass

    # what the predictors add to a rank is in the modelled latency: as many weights as one rank's tensors hold
    tensors = load_file(out.parent / new.compensation.file)
    of_rank = sum(t.numel() for name, t in tensors.items() if ".ranks.0." in name)
    sizes = ModelSizes.of(AutoModelForCausalLM.from_pretrained(llama))
    assert predictor_weights(new, sizes) == of_rank > 0
    run = spd("plan", tmp_path / "p.json", "--drop", 3, "--strategy", "block_drop", "-o", out, "--device", "cpu",
              "--hardware", cable(tmp_path / "cable.csv"))  # fmt: skip
    assert run.code == 0, run.err
    decode = read(Plan, out).latency[0]
    added = of_rank * 2 / (ATTAINED * 1e6)
    assert decode.planned_seconds == pytest.approx(decode.dense_seconds - 3 * decode.all_reduce_seconds + added)

    # what it costs by itself counts once in what is predicted, whatever else is asked for
    for more in (("--sync-bits", 8), ("--replicate", "100%")):
        run = spd(
            "plan", tmp_path / "p.json", "--drop", 3, "--strategy", "block_drop", *more, "-o", out, "--device", "cpu"
        )
        assert run.code == 0, run.err
        predicted, alone = read(Plan, out).predicted, profile.recovered.alone
        dearest = max(profile.sensitivity(DROP, "kl").values())
        assert alone.kl * 0.9 < predicted.kl < alone.kl * 1.1 + dearest, more
        assert predicted.kl < new.predicted.kl + alone.kl / 2, more
        assert predicted.ppl_increase != new.predicted.ppl_increase, more

    assert "less than the 2" in spd("plan", tmp_path / "p.json", "--drop", 1, "-o", out).err
    assert "is recovered" in spd("plan", tmp_path / "p.json", "--tau1", 0, "--tau2", 1, "-o", out).err
    run = spd("plan", tmp_path / "p.json", "--max-kl", 0, "-o", tmp_path / "no.json", "--device", "cpu")
    assert run.code == 1 and "No further sync point" in run.err and not (tmp_path / "no.json").exists()


def cable(path: Path) -> Path:
    """Four ranks whose memory is slow and whose arithmetic is not."""
    path.write_text("ranks,bytes,seconds,memory_bytes_per_second,flops_per_second\n4,1,1e-3,1e6,1e15\n")
    return path


def test_streamed_it_is_the_same(spd, folder, tmp_path) -> None:
    given = ("--tp", 4, "--data", folder / "all.jsonl", "--max-samples", 4, "--verify-samples", 2, "--device", "cpu")
    found = []
    for stream in ((), ("--stream",)):
        out = tmp_path / f"{len(stream)}.json"
        assert spd("profile", folder / "out", *given, *stream, "-o", out).code == 0
        found.append(read(Profile, out))
    for a, b in zip(found[0].measurements, found[1].measurements, strict=True):
        assert a.kl == pytest.approx(b.kl, rel=1e-4)
    assert found[0].recovered.alone.kl == pytest.approx(found[1].recovered.alone.kl, rel=1e-4)


def test_eval_compares_with_the_model_it_was_made_from(spd, folder, llama, tmp_path) -> None:
    """A task the recovered checkpoint, every sync kept, answers otherwise than the original."""
    from spd_calib.evaluation.harness import TaskSuite

    seen = []
    plan = read(Plan, folder / "out/plan.json")
    original, recovered = open_session(str(llama), 4).load(), open_session(str(folder / "out"), 4).load()
    _, drops = load_plan(folder / "out/plan.json")

    class Noting(TaskSuite):
        def __init__(self):
            pass

        def run(self, lm, tokenizer, **_):
            seen.append((lm, lm.blocks[0].present.drops.decode))

    Noting().run_dense_and_planned(recovered, None, drops=drops, dense_lm=original)
    assert [lm for lm, _ in seen] == [original, recovered]
    assert [d for _, d in seen] == [NOTHING_DROPPED, plan.drops | drops]


def test_the_dense_model_that_writes_is_the_one_it_was_made_from(folder, llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    expected = AutoModelForCausalLM.from_pretrained(llama).generate(ids, do_sample=False, max_new_tokens=12)
    dense, planned = generate(
        folder / "out/plan.json", ["the cat"], dense=True, new_tokens=12, run=RunOptions(device="cpu")
    )
    assert (dense.model, planned.model) == ("dense", "plan")
    assert dense.text == tokenizer.decode(expected[0], skip_special_tokens=True) != planned.text


def test_an_object_of_its_weights_is_no_dense_model(folder):
    """What it drops, and what it was fitted on, lies in the folder."""
    own = str(folder / "out")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(own), AutoTokenizer.from_pretrained(own)
    with pytest.raises(InputError, match=r"was loaded from .*out, which `recover` wrote: .* give the folder in place"):
        profile(model, tokenizer=tokenizer, tp=4, data=str(folder / "all.jsonl"), run=RunOptions(device="cpu"))


def test_what_cannot_be_profiled_again(spd, folder, tmp_path) -> None:
    out = tmp_path / "p.json"
    data = ("--data", folder / "all.jsonl", "--device", "cpu", "-o", out)
    for options, words in (
        (("--tp", 2), "was recovered for 4 ranks"),
        (("--tp", 4, "--method", "fisher"), "by --method single"),
        (("--tp", 4, "--confidence", 0.9), "by --method single"),
        (("--tp", 4, "--sync-points", "mlp", "--strategy", "magic"), "cannot be measured"),
    ):
        run = spd("profile", folder / "out", *data, *options)
        assert run.code == 2 and words in run.err and not out.exists(), run.err
    # another plan.json than when it was profiled
    assert spd("profile", folder / "out", *data, "--tp", 4, "--max-samples", 4, "--verify-samples", 2).code == 0
    plan = folder / "out/plan.json"
    before = plan.read_text()
    try:
        plan.write_text(before.replace('"reason": "', '"reason": "again, '))
        run = spd("plan", out, "--drop", 3, "-o", tmp_path / "again.json")
        assert run.code == 2 and "another plan.json" in run.err
    finally:
        plan.write_text(before)


def test_text_that_it_was_fitted_on_is_known_by_any_name_in_any_order_and_lengths(spd, folder, tmp_path) -> None:
    """A copy of the text, its lines backwards, with another in front, cut elsewhere: always the same are left out."""
    lines = (folder / "all.jsonl").read_text().splitlines()
    new, copy = {"text": "Tom and Lily went home. " * 9}, tmp_path / "copy.jsonl"
    copy.write_text("\n".join([json.dumps(new), *reversed(lines)]))
    out = tmp_path / "p.json"
    for lengths in (
        ("--seq-len", 24),
        ("--seq-len", 16),
        ("--seq-len", 32, "--min-len", 24),
        ("--seq-len", 24, "--pack"),
    ):
        run = spd("profile", folder / "out", "--tp", 4, "--data", copy, *lengths, "--max-samples", 500,
                  "--verify-samples", 2, "--device", "cpu", "-o", out)  # fmt: skip
        assert run.code == 0, run.err
        said = " ".join(run.err.split()).partition(" sequences are left out, since the model was fitted on them")
        assert said[1] and (int(said[0].split()[-1]) == 20 or "--pack" in lengths), (lengths, run.err)


def test_a_folder_that_lost_what_recover_wrote_is_no_dense_model(spd, folder, tmp_path) -> None:
    given = ("--tp", 4, "--data", folder / "all.jsonl", "--max-samples", 4, "--verify-samples", 2, "--device", "cpu")
    for name, words in (("recovery.json", "on what text"), ("plan.json", "was written by `recover`")):
        own = tmp_path / name
        shutil.copytree(folder / "out", own)
        (own / name).unlink()
        run = spd("profile", own, *given, "-o", tmp_path / "p.json")
        assert run.code == 2 and words in " ".join(run.err.split()) and not (tmp_path / "p.json").exists(), run.err


def test_a_plan_is_found_in_a_folder_that_was_renamed(spd, folder, tmp_path, monkeypatch) -> None:
    shutil.copytree(folder / "out", tmp_path / "moved")
    text = (tmp_path / "moved/plan.json").read_text()
    (tmp_path / "moved/plan.json").write_text(text.replace(str(folder / "out"), "out"))
    monkeypatch.chdir(tmp_path)
    assert spd("check", "moved/plan.json").code == 0
