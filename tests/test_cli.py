"""The commands as a user types them: what they write, print and refuse."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import yaml

from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.formats.files import read
from spd_calib.formats.pareto import Pareto
from spd_calib.formats.plan import Plan
from spd_calib.formats.profile import Profile
from spd_calib.models.load import locate
from spd_calib.parallel.session import open_session
from spd_calib.sensitivity.measure import Subject, measure
from spd_calib.sensitivity.text import TextOptions, load_text


@pytest.fixture
def plan_file(spd, profile_file, tmp_path) -> Path:
    path = tmp_path / "plan.json"
    assert spd("plan", profile_file, "--drop", "2", "--strategy", "block_drop", "-o", path).code == 0
    return path


def test_profile_measures_every_block_and_strategy(profile_file):
    p = read(Profile, profile_file)
    assert len(p.measurements) == 8 and p.strategies == [Strategy.BLOCK_DROP, Strategy.PLAIN_DROP]
    assert p.text.sequences == 12 and p.verify_text.first == 12 and p.verify_text.sequences == 8
    assert all(m.kl > 0 and m.kl_stderr > 0 for m in p.measurements)
    assert p.model.id.endswith("0") or p.model.id  # as given
    assert "torch" in p.provenance.versions


def test_the_same_command_writes_the_same_file(spd, llama, text, tmp_path):
    arguments = ("--tp", 2, "--data", text, "--seq-len", 16, "--max-samples", 4, "--verify-samples", 2)
    texts = []
    for _ in range(2):
        outcome = spd("profile", llama, *arguments, "--json", "-o", tmp_path / "p.json")
        assert outcome.code == 0, outcome.err
        texts.append((tmp_path / "p.json").read_text())
        assert outcome.out == texts[-1]
        assert "least sensitive block first" in outcome.err and "first batch: block 0" in outcome.err
    assert texts[0] == texts[1]


def test_cumulative_ranked_by_ppl(spd, llama, text, tmp_path):
    outcome = spd(
        "profile", llama, "--tp", 2, "--data", text, "--seq-len", 16, "--max-samples", 4, "--verify-samples", 2,
        "--method", "cumulative", "--rank-by", "ppl", "--strategy", "block_drop", "-o", tmp_path / "p.json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    p = read(Profile, tmp_path / "p.json")
    assert [m.dropped for m in p.measurements] == [[3], [2, 3], [1, 2, 3], [0, 1, 2, 3]]
    total = sum(p.sensitivity(Strategy.BLOCK_DROP).values())
    assert total == pytest.approx(p.measurements[-1].ppl - p.baseline.ppl)


def test_plan_drops_what_it_was_asked_to(plan_file, profile_file, llama, text):
    plan, p = read(Plan, plan_file), read(Profile, profile_file)
    assert len(plan.drops) == 2
    session = open_session(str(llama), 4)
    sequences = load_text(TextOptions(str(text), 32, 32, 12, 8), session.tokenizer).calibration
    best = [Point(block, "attention") for block in p.ranking(Strategy.BLOCK_DROP)[:2]]
    plans = [plan.drops, Drops.of(dict.fromkeys(best, Strategy.BLOCK_DROP))]
    chosen, ranked = measure(Subject(session.load("cpu")), sequences, plans=plans)[1]
    assert chosen.kl <= ranked.kl
    assert plan.verified.text == p.verify_text and plan.verified.kl > 0
    assert plan.blocks[1].module == "model.layers.1"
    assert plan.requires == []


def test_plan_keeps_its_budget_on_held_out_text(spd, profile_file, tmp_path):
    p = read(Profile, profile_file)
    limit = sorted(m.kl for m in p.of(Strategy.BLOCK_DROP).values())[1] * 2
    outcome = spd("plan", profile_file, "--max-kl", limit, "--json", "-o", tmp_path / "plan.json")
    assert outcome.code == 0, outcome.err
    plan = Plan.model_validate_json(outcome.out)
    assert len(plan.drops) and plan.verified.kl <= limit
    assert "verified, held-out text" in outcome.err


def test_a_budget_that_cannot_be_met_exits_1_and_writes_nothing(spd, profile_file, tmp_path):
    outcome = spd("plan", profile_file, "--max-kl", "1e-9", "-o", tmp_path / "plan.json")
    assert outcome.code == 1 and "best plan found" in outcome.err
    assert not (tmp_path / "plan.json").exists()


def test_the_papers_rule_marks_what_to_recover(spd, profile_file, tmp_path):
    values = sorted(read(Profile, profile_file).sensitivity(Strategy.BLOCK_DROP, "ppl").values())
    tau1, tau2 = (values[0] + values[1]) / 2, (values[2] + values[3]) / 2
    outcome = spd(
        "plan", profile_file, "--tau1", tau1, "--tau2", tau2, "--strategy", "block_drop", "-o", tmp_path / "plan.json"
    )
    assert outcome.code == 0, outcome.err
    recoveries = sorted(str(b.recovery) for b in read(Plan, tmp_path / "plan.json").blocks)
    assert recoveries == ["None", "distillation", "distillation", "grouping+distillation"]


def test_check_and_report(spd, plan_file, profile_file, tmp_path):
    outcome = spd("check", plan_file)
    assert outcome.code == 0 and "6 planned" in outcome.err
    outcome = spd("report", profile_file, "--plan", plan_file, "--png", tmp_path / "f.png")
    assert outcome.code == 0
    assert (tmp_path / "f.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_check_finds_a_model_whose_weights_changed(spd, text, tmp_path):
    folder = tiny.save(tiny.build("llama"), tmp_path / "model")
    common = ("--seq-len", 16, "--max-samples", 4, "--verify-samples", 2, "--strategy", "block_drop")
    assert spd("profile", folder, "--tp", 2, "--data", text, *common, "-o", tmp_path / "p.json").code == 0
    assert spd("plan", tmp_path / "p.json", "--drop", 1, "-o", tmp_path / "plan.json").code == 0
    assert spd("check", tmp_path / "plan.json").code == 0
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    outcome = spd("check", tmp_path / "plan.json")
    assert outcome.code == 1 and "weights differ" in outcome.err
    outcome = spd("plan", tmp_path / "p.json", "--drop", 1, "-o", tmp_path / "plan2.json")
    assert outcome.code == 2 and "weights differ" in outcome.err and not (tmp_path / "plan2.json").exists()
    shutil.rmtree(folder)
    tiny.save(tiny.build("qwen3"), folder)
    assert "architecture differs" in spd("check", tmp_path / "plan.json").err


def test_the_fingerprint_is_of_the_weights_not_of_their_files(tmp_path):
    from spd_calib.models.fingerprint import weight_fingerprint

    model = tiny.build("llama")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "cut", max_shard_size="100KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    assert weight_fingerprint(tmp_path / "whole") == weight_fingerprint(tmp_path / "cut")
    assert weight_fingerprint(tiny.save(tiny.build("llama", seed=1), tmp_path / "other")) != weight_fingerprint(
        tmp_path / "whole"
    )


SHORT = ("--seq-len", 16, "--max-samples", 4, "--verify-samples", 2, "--device", "cpu")


def test_both_sync_points_from_profile_to_check(spd, llama, text, tmp_path):
    profile, plan = tmp_path / "p.json", tmp_path / "plan.json"
    both = ("--sync-points", "attention,mlp", "--strategy", "block_drop", "--rank-by", "kl")
    outcome = spd("profile", llama, "--tp", 2, "--data", text, *SHORT, *both, "-o", profile)
    assert outcome.code == 0 and "MLP: block_drop, least sensitive" in outcome.err, outcome.err
    p = read(Profile, profile)
    assert len(p.measurements) == 7 and sorted(p.of(Strategy.BLOCK_DROP, "mlp")) == [0, 1, 2]
    outcome = spd("plan", profile, "--drop", "100%", "--compare", "-o", plan)
    assert outcome.code == 0 and "evenly spaced" in outcome.err, outcome.err
    made = read(Plan, plan)
    assert made.requires == ["mlp_drop"] and made.drops == Drops.of_blocks(["block_drop"] * 4, ["block_drop"] * 3)
    assert "8 a forward and rank become 1" in " ".join(outcome.err.split())
    assert spd("check", plan).code == 0
    assert spd("report", profile, "--plan", plan, "--png", tmp_path / "f.png").code == 0


def test_fisher_from_profile_to_plan(spd, llama, text, tmp_path):
    profile, plan, front = tmp_path / "p.json", tmp_path / "plan.json", tmp_path / "pareto.json"
    fisher = ("--method", "fisher", "--sync-points", "attention,mlp", "--target-stderr", 0.3)
    outcome = spd("profile", llama, "--tp", 2, "--data", text, *SHORT, *fisher, "-o", profile)
    assert outcome.code == 0 and "of error in a KL" in outcome.err, outcome.err
    p = read(Profile, profile)
    assert p.rank_by == "kl" and p.fisher is not None and p.fisher.sampling_error <= 0.3
    outcome = spd("plan", profile, "--pareto", front)
    assert outcome.code == 0 and not plan.exists(), outcome.err
    assert [x.drops for x in read(Pareto, front).points] == list(range(8))
    outcome = spd("plan", profile, "--max-ppl-increase", "20%", "--pareto", front, "-o", plan)
    assert outcome.code == 0, outcome.err
    made = read(Plan, plan)
    assert made.verified.ppl_increase <= 0.2 and made.predicted.ppl_increase is None
    assert any(x.measured_kl is not None for x in read(Pareto, front).points)
    assert spd("report", profile, "--plan", plan, "--png", tmp_path / "f.png").code == 0


def test_recipes_give_defaults_that_the_command_line_overrides(spd, llama, text, tmp_path):
    recipe = {
        "profile": {
            "model": str(llama), "tp": 2, "data": str(text), "seq_len": 16, "max-samples": 4, "verify_samples": 2,
            "strategy": ["block_drop"], "output": str(tmp_path / "from-recipe.json"),
        }
    }  # fmt: skip
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    outcome = spd("profile", "--recipe", path, "--tp", 4)
    assert outcome.code == 0, outcome.err
    p = read(Profile, tmp_path / "from-recipe.json")
    assert p.tensor_parallel.size == 4 and p.text.seq_len == 16 and p.strategies == [Strategy.BLOCK_DROP]
    path.write_text(yaml.safe_dump({"profile": {"modle": "x"}}))
    outcome = spd("profile", "--recipe", path)
    assert outcome.code == 2 and "'modle'" in outcome.err
    outcome = spd("plan", "--recipe", path)
    assert outcome.code == 2 and "no section 'plan'" in outcome.err


def test_every_recipe_is_understood_by_every_command_it_names():
    """Keys of each section are options of its command; each opens with the command that runs it."""
    import typer.main

    from spd_calib.cli.main import app
    from spd_calib.cli.options import read_recipe, section

    commands = typer.main.get_command(app).commands
    recipes = sorted(Path("recipes").rglob("*.yaml"))
    assert len(recipes) >= 7
    for path in recipes:
        assert f"make pipeline RECIPE={path}" in path.read_text().split("profile:")[0]
        for name in read_recipe(path):
            assert section(path, name, typer.Context(commands[name]))


def test_a_quantised_checkpoint_is_refused_by_its_configuration(spd, text, tmp_path):
    folder = tiny.save(tiny.build("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))
    outcome = spd("profile", folder, "--tp", 2, "--data", text, "--seq-len", 16, "-o", tmp_path / "p.json")
    assert outcome.code == 2 and "quantised (bitsandbytes)" in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "p.json").exists()


def test_an_unreachable_hub_is_a_clear_error(spd, text, monkeypatch, tmp_path):
    """The real loading code, with the hub's address pointing to a closed port of this machine."""
    import huggingface_hub

    def closed(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", closed)
    outcome = spd("profile", "org/name", "--tp", 2, "--data", text, "-o", tmp_path / "p.json")
    assert outcome.code == 2 and "the model hub cannot be reached" in outcome.err


def test_what_is_fetched_from_the_hub(monkeypatch, tmp_path):
    """Weights, configuration and tokenizer, with its chat templates, in whatever format they are; no pickles."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    there = ["config.json", "model.safetensors", "tokenizer.model", "vocab.txt", "chat_template.jinja", "a.bin"]
    fetched = []

    def fetch(name, *, revision, allow_patterns):
        fetched.extend(filter_repo_objects(there, allow_patterns=allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    locate("org/name")
    assert fetched == there[:-1]


def test_help_answers_without_heavy_imports(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; sys.argv = ['spd-calib', '--help']\n"
        "from spd_calib.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'pandas', 'matplotlib', 'pydantic', 'lm_eval'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "profile" in done.stdout
