"""Input that cannot be used, over all commands: one sentence that names it, exit code 2, nothing written."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
from plans import write_plan

WITHOUT_O = ("check", "generate", "report", "diff")
BAD = [
    (["profile", "{llama}", "--tp", "3", "--data", "{text}"], "8 query heads"),
    (["profile", "{llama}", "--tp", "0", "--data", "{text}"], "--tp"),
    (["profile", "{falcon_mamba}", "--tp", "2", "--data", "{text}"], "no plain attention"),
    (["profile", "{gpt_neox_sequential}", "--tp", "2", "--data", "{text}"], "fused"),
    (["profile", "{gpt_neox}", "--tp", "2", "--data", "{text}"], "parallel"),
    (["profile", "{llama4}", "--tp", "2", "--data", "{text}"], "mixture of experts"),
    (["profile", "{opt_350m}", "--tp", "2", "--data", "{text}"], "post-norm"),
    (["profile", "{gemma4_inputs}", "--tp", "2", "--data", "{text}"], "per_layer_input_norm"),
    (["profile", "{llama}", "--tp", "2", "--data", "{tmp}/none.jsonl"], "no data file"),
    (["profile", "{llama}", "--tp", "2", "--data", "{empty}"], "holds no text"),
    (["profile", "{llama}", "--tp", "2", "--data", "{llama}/model.safetensors"], "no .jsonl"),
    (["profile", "{llama}", "--tp", "2", "--data", "{text}", "--seq-len", "4096"], "128 tokens"),
    (["profile", "{llama}", "--tp", "2", "--data", "{text}", "--seq-len", "16", "--min-len", "32"], "--min-len"),
    (["profile", "{llama}", "--tp", "2", "--data", "{text}", "--strategy", "keep_sync"], "cannot be measured"),
    (["profile", "{llama}", "--tp", "2", "--data", "{text}", "--method", "fast"], "--method"),
    (["profile", "{llama}", "--tp", "2", "--data", "{text}", "--rank-by", "luck"], "--rank-by"),
    (["profile", "{llama}", "--tp", "2", "--data", "{text}", "--sync-points", "both"], "--sync-points"),
    (
        ["profile", "{llama}", "--tp", "2", "--data", "{text}", "--sync-points", "mlp", "--method", "cumulative"],
        "paper",
    ),
    (["profile", "{llama}", "--tp", "2", "--data", "{text}", "--target-stderr", "0.1"], "--target-stderr belongs"),
    (
        ["profile", "{llama}", "--tp", "2", "--data", "{text}", "--method", "fisher", "--target-stderr", "0"],
        "no relative",
    ),
    (["profile", "{llama}", "--tp", "2", "--data", "{text}", "--method", "fisher", "--rank-by", "ppl"], "KL alone"),
    (["profile", "{llama}", "--tp", "2", "--data", "{text}", "--method", "fisher", "--tasks", "x"], "KL alone"),
    (
        ["profile", "{llama}", "--tp", "2", "--data", "{text}", "--method", "fisher", "--strategy", "plain_drop"],
        "alone",
    ),
    (["profile", "{llama}", "--tp", "2", "--data", "{text}", "--dtype", "int8"], "--dtype"),
    (
        ["profile", "{llama}", "--tp", "2", "--data", "{text}", "--device", "cuda:77", "--seq-len", "16"],
        "device 'cuda:77'",
    ),
    (["profile", "{llama}", "--tp", "2", "--data", "{text}", "-o", "{tmp}/no/p.json"], "does not exist"),
    (["profile", "{llama}", "--tp", "2", "--data", "{text}", "-o", "{tmp}"], "is a folder"),
    (["profile", "{tmp}/nothing", "--tp", "2", "--data", "{text}"], "no model folder"),
    (["profile", "{tmp}", "--tp", "2", "--data", "{text}"], "no config.json"),
    (["profile", "{pickle}", "--tp", "2", "--data", "{text}"], "pickle"),
    (["profile", "{torn}", "--tp", "2", "--data", "{text}"], "cut off"),
    (["plan", "{profile}"], "none is given"),
    (["plan", "{profile}", "--max-kl", "0.1", "--drop", "3"], "--max-kl and --drop"),
    (["plan", "{profile}", "--tau1", "0.1"], "--tau2"),
    (["plan", "{profile}", "--tau1", "0.2", "--tau2", "0.1"], "below --tau1"),
    (["plan", "{profile}", "--max-kl", "lots"], "--max-kl"),
    (["plan", "{profile}", "--max-kl", "1", "--max-logprob-diff", "1"], "--max-kl and --max-logprob-diff"),
    (["plan", "{profile}", "--pareto", "{tmp}"], "is a folder"),
    (["plan", "{profile}", "--drop", "17"], "4 blocks"),
    (["plan", "{profile}", "--drop", "2", "--strategy", "keep_sync"], "nothing to plan"),
    (["plan", "{profile}", "--drop", "2", "--strategy", "hope"], "'hope'"),
    (["plan", "{tmp}/none.json", "--drop", "1"], "no file"),
    (["plan", "{truncated}", "--drop", "1"], "not valid JSON"),
    (["plan", "{text}", "--drop", "1"], "not valid JSON"),
    (["plan", "{list}", "--drop", "1"], "not a profile"),
    (["plan", "{changed}", "--drop", "1"], "changed since"),
    (["check", "{profile}"], "not a plan"),
    (["check", "{truncated}"], "not valid JSON"),
    (["eval", "{profile}", "--tasks", "x"], "not a plan"),
    (["profile", "--recipe", "{tmp}/none.yaml"], "cannot be read"),
    (["profile", "--recipe", "{list}"], "section"),
    (["profile", "{llama}", "--tp", "2", "--data", "{binary}.jsonl"], "binary.jsonl"),
    (["profile", "{llama}", "--tp", "2", "--data", "{no_text_key}"], "text"),
    (["profile", "{llama}", "--tp", "2", "--data", "{one}", "--seq-len", "16"], "1"),
    (["profile", "{llama}", "--tp", "99999999999999999999", "--data", "{text}"], "query heads"),
    (["profile", "{llama}", "--tp", "-4", "--data", "{text}"], "--tp"),
    (["profile", "{llama}", "--tp", "two", "--data", "{text}"], "--tp"),
    (["profile", "{lying_header}", "--tp", "2", "--data", "{text}"], "model.safetensors"),
    (["profile", "{huge}", "--tp", "2", "--data", "{text}", "--seq-len", "16"], "huge"),
    (["profile", "{junk_config}", "--tp", "2", "--data", "{text}"], "config.json"),
    (["profile", "{remote_code}", "--tp", "2", "--data", "{text}"], "code of its own"),
    (["profile", "{no_tokenizer}", "--tp", "2", "--data", "{text}"], "tokenizer"),
    (["profile", "{loop}", "--tp", "2", "--data", "{text}"], "loop"),
    (["plan", "{loop}", "--drop", "1"], "cannot be read"),
    (["plan", "{tmp}", "--drop", "1"], "cannot be read"),
    (["plan", "{binary}.jsonl", "--drop", "1"], "not valid JSON"),
    (["plan", "{deep}", "--drop", "1"], "not valid JSON"),
    (["plan", "{nan}", "--drop", "1"], "finite"),
    (["plan", "{next_version}", "--drop", "1"], "version 2"),
    (["plan", "{boolean_version}", "--drop", "1"], "version True"),
    (["plan", "{unknown_key}", "--drop", "1"], "surprise"),
    (["plan", "{profile}", "--max-kl", "nan"], "--max-kl"),
    (["plan", "{profile}", "--max-kl", "inf"], "--max-kl"),
    (["plan", "{profile}", "--max-ppl-increase", "-1%"], "--max-ppl-increase"),
    (["plan", "{profile}", "--drop", "1", "-o", "{tmp}/no/\u00e9\u4e2d.json"], "does not exist"),
    (["plan", "--recipe", "{tag}"], "not valid YAML"),
    (["plan", "--recipe", "{bomb}"], "{bomb}"),
    (["plan", "--recipe", "{binary}.jsonl"], "not valid YAML"),
    (["plan", "{profile}", "--recipe", "{wrong_type}"], "drop"),
    (["recover", "{profile}", "--data", "{text}"], "not a plan"),
    (["recover", "{truncated}", "--data", "{text}"], "not valid JSON"),
    (["eval", "{tmp}/none.json", "--tasks", "x"], "no file"),
    (["eval", "{binary}.jsonl", "--tasks", "x"], "not valid JSON"),
    (["check", "{tmp}"], "cannot be read"),
    (["check", "{tmp}/none.json", "--runtime", "vllm"], "no file"),
    (["bench", "{profile}"], "not a plan"),
    (["bench", "{truncated}"], "not valid JSON"),
    (["generate", "{profile}", "--prompt", "x"], "not a plan"),
    (["generate", "{tmp}/none.json", "--prompt", "x"], "no file"),
    (["report", "{truncated}", "--png", "{tmp}/f.png"], "not valid JSON"),
    (["report", "{profile}", "--png", "{tmp}/no/f.png"], "does not exist"),
    (["report", "{profile}", "--plan", "{profile}", "--png", "{tmp}/f.png"], "not a plan"),
    (["report", "{profile}"], "Nothing is asked for"),
    (["report", "{tmp}", "-o", "{tmp}/r.html"], "no file {tmp}/profile.json"),
    (["report", "{tmp}/none", "-o", "{tmp}/r.html"], "no file {tmp}/none"),
    (["report", "{profile}", "-o", "{tmp}"], "is a folder"),
    (["report", "{profile}", "-o", "{tmp}/no/r.html"], "does not exist"),
    (["report", "{other_model}", "--plan", "{plan}", "-o", "{tmp}/r.html"], "a plan of another model"),
    (["report", "{profile}", "--plan", "{plan}", "-o", "{tmp}/r.html"], "made from another profile"),
    (["diff", "{profile}", "{plan}"], "is a profile and"),
    (["diff", "{profile}", "{other_model}"], "4 blocks and B of one with 8"),
    (["diff", "{profile}", "{tmp}/none.json"], "`spd-calib profile or plan` writes one"),
    (["diff", "{truncated}", "{profile}"], "not valid JSON"),
    (["diff", "{profile}", "{hardware}"], "not a profile or plan file"),
    (["demo", "-o", "{text}"], "stories.jsonl"),
    (["demo", "-o", "{notes}"], "is no plan"),
    (["plan", "{profile}", "--drop", "2", "--sync-bits", "\u00b2"], "none of 8, 6, 4"),
    (["plan", "{profile}", "--drop", "\u00b2"], "no number of blocks"),
    (["plan", "{profile}", "--tau1", "1", "--tau2", "inf"], "no threshold"),
    (["plan", "{profile}", "--drop", "2", "-o", "{tmp}/x.json", "--pareto", "{huge}/../x.json"], "both the"),
    (["eval", "{plan}", "--tasks", "demo", "-o", "{tmp}/x.jsonl"], "a log of documents"),
    (["eval", "{plan}", "--tasks", "demo,piqa"], "runs alone"),
    (["profile", "{llama}", "--tp", "2", "--data", "{text}", "-o", "{plan}"], "is no profile"),
    (["profile", "{llama}", "--tp", "2", "--data", "{text}", "-o", "{text}"], "is no profile"),
    (["plan", "{profile}", "--drop", "1", "-o", "{profile}"], "is no plan"),
    (["plan", "{profile}", "--drop", "1", "-o", "{llama}/model.safetensors"], "is no plan"),
    (["plan", "{profile}", "--drop", "1", "--pareto", "{profile}"], "is no pareto"),
    (["plan", "{profile}", "--drop", "1", "-o", "{tmp}/x.json", "--pareto", "{tmp}/x.json"], "name two files"),
    (["eval", "{plan}", "--tasks", "x", "-o", "{plan}"], "is no results"),
    (["bench", "{plan}", "-o", "{plan}"], "is no hardware"),
    (["report", "{profile}", "-o", "{profile}"], "is no page"),
    (["report", "{profile}", "--png", "{profile}"], "is no figure"),
    (["report", "{profile}", "-o", "{tmp}/x.html", "--png", "{tmp}/x.html"], "name two files"),
    (["plan", "{twice}", "--drop", "1"], "'model' twice"),
    (["check", "{plan}", "--runtime", "vllm", "--as-served", "'"], "--as-served"),
    (["bench", "{plan}", "--runtime", "vllm", "--as-served", "'"], "--as-served"),
    (["check", "{plan}", "--runtime", "torchrun", "--new-tokens", "128"], "beyond the model's 128"),
    (["bench", "{plan}", "--rounds", "1", "--tokens", "600"], "128; lower"),
    (["generate", "{plan}", "--prompt", "x", "--seed", str(2**70)], "--seed"),
    (["profile", "a" * 300, "--tp", "2", "--data", "{text}"], "too long for the name"),
    (["profile", "a/b/c", "--tp", "2", "--data", "{text}"], "no model folder"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory, llama, text, profile_file) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("bad")
    out = {"tmp": tmp, "llama": llama, "text": text, "profile": profile_file}
    for name in ("falcon_mamba", "gpt_neox_sequential", "gpt_neox", "llama4", "opt_350m", "gemma4_inputs"):
        out[name] = tiny.save(tiny.build_refused(name), tmp / name)
    for name in ("pickle", "torn"):
        out[name] = Path(shutil.copytree(llama, tmp / name))
    (out["pickle"] / "model.safetensors").rename(out["pickle"] / "pytorch_model.bin")
    whole = (llama / "model.safetensors").read_bytes()
    (out["torn"] / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    for name, content in {
        "empty.jsonl": "",
        "truncated.json": profile_file.read_text()[:700],
        "list.json": "[1, 2]",
    }.items():
        (tmp / name).write_text(content)
        out[name.split(".")[0]] = tmp / name
    other = tiny.write_jsonl(tmp / "other.jsonl", tiny.stories(40, seed=5))
    changed = json.loads(profile_file.read_text())
    changed["text"]["source"] = str(other)
    (tmp / "changed.json").write_text(json.dumps(changed))
    out["changed"] = tmp / "changed.json"
    out["plan"] = write_plan(tmp / "plan.json", llama, 4, ["keep_sync"] * 4)
    out["other_model"] = Path(__file__).parent.parent / "results/demo/profile.json"
    out["hardware"] = tmp / "hardware.json"
    out["hardware"].write_text('{"format": "spd-calib/hardware"}')
    out["notes"] = tmp / "notes"
    out["notes"].mkdir()
    (out["notes"] / "plan.json").write_text('{"another tool": 1}')
    return {**out, **cruel_files(tmp, profile_file), **cruel_models(tmp, llama)}


def cruel_files(tmp: Path, profile_file: Path) -> dict[str, Path]:
    """Files that no command may take, by the name of what is wrong with them."""
    profile = json.loads(profile_file.read_text())
    nan = json.loads(profile_file.read_text())
    nan["measurements"][0]["kl"] = float("nan")
    aliases = "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(30))
    contents = {
        "binary.jsonl": bytes(range(256)) * 40,
        "no_text_key.jsonl": b'{"story": "once"}\n' * 40,
        "one.jsonl": (json.dumps({"text": tiny.stories(1)[0]}) + "\n").encode(),
        "deep.json": b"[" * 100_000,
        "nan.json": json.dumps(nan).encode(),
        "next_version.json": json.dumps({**profile, "version": 2}).encode(),
        "boolean_version.json": json.dumps({**profile, "version": True}).encode(),
        "twice.json": profile_file.read_bytes().replace(b'"model"', b'"model": 1, "model"', 1),
        "unknown_key.json": json.dumps({**profile, "surprise": 1}).encode(),
        "tag.yaml": b"plan: !!python/object/apply:os.system ['exit 3']\n",
        "bomb.yaml": f"a0: &a0 [x]\n{aliases}".encode(),
        "wrong_type.yaml": b"plan: {drop: [1, {2: 3}]}\n",
    }
    for name, content in contents.items():
        (tmp / name).write_bytes(content)
    (tmp / "loop.json").symlink_to(tmp / "loop.json")
    places = {name.split(".")[0]: tmp / name for name in [*contents, "loop.json"]}
    return {**places, "binary": tmp / "binary"}


def cruel_models(tmp: Path, llama: Path) -> dict[str, Path]:
    """Copies of a model folder, each with one thing wrong."""
    names = ("lying_header", "huge", "junk_config", "remote_code", "no_tokenizer")
    out = {name: Path(shutil.copytree(llama, tmp / name)) for name in names}
    weights = out["lying_header"] / "model.safetensors"
    weights.write_bytes((2**62).to_bytes(8, "little") + weights.read_bytes()[8:])
    config = json.loads((llama / "config.json").read_text())
    (out["huge"] / "config.json").write_text(json.dumps({**config, "hidden_size": 10**9}))
    (out["junk_config"] / "config.json").write_bytes(b"\x80\x04junk")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (out["remote_code"] / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto_map}))
    (out["remote_code"] / "evil.py").write_text("raise SystemExit('remote code ran')\n")
    for path in out["no_tokenizer"].glob("*token*"):
        path.unlink()
    return out


@pytest.mark.parametrize(("arguments", "word"), BAD, ids=[f"{a[0]}-{w}" for a, w in BAD])
def test_bad_input_is_one_sentence_and_exit_2(spd, places, arguments, word, tmp_path):
    arguments = [a.format(**places) for a in arguments]
    if "-o" not in arguments and arguments[0] not in WITHOUT_O and "--recipe" not in arguments:
        arguments += ["-o", str(tmp_path / "out.json")]
    kept = {path: path.read_bytes() for path in map(Path, arguments) if len(str(path)) < 256 and path.is_file()}
    outcome = spd(*arguments)
    assert outcome.code == 2, outcome.err
    assert word.format(**places) in outcome.err, outcome.err
    assert "Traceback" not in outcome.err and outcome.out == ""
    assert list(tmp_path.iterdir()) == [] and kept == {p: p.read_bytes() for p in kept}
    # the last line is the only sentence of the error: ours, or the command line's own behind its usage
    assert outcome.err.count("spd-calib: ") + outcome.err.count("\nError: ") == 1
    assert outcome.err.splitlines()[-1].startswith(("spd-calib: ", "Error: "))
