"""Where a model comes from: an object in memory, which stays as it was, a folder named in a file, or --model."""

import copy
import json
import shutil

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from spd_calib import RunOptions, TaskOptions, TextSelection, check, evaluate, plan, profile
from spd_calib.api.opening import open_model, open_model_of, place_of, resolved_for
from spd_calib.errors import InputError, OtherModel
from spd_calib.formats.files import dumps, read
from spd_calib.formats.plan import Plan
from spd_calib.models.in_memory import sharing_copy
from spd_calib.parallel.session import open_session

CPU = RunOptions(device="cpu")
SHORT = TextSelection(seq_len=16, max_samples=4, verify_samples=3)


@pytest.fixture
def model():
    return tiny.build("llama")


@pytest.fixture
def tokenizer():
    return tiny.tokenizer(vocab=131)


@pytest.mark.parametrize("family", tiny.SUPPORTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_reference_is_that_of_the_folder_it_would_be_saved_to(family, dtype, tokenizer, tmp_path):
    built = tiny.build(family).to(dtype)
    in_memory = open_model(built, tp=2, tokenizer=tokenizer).ref
    saved = open_session(str(tiny.save(built, tmp_path / "m")), 2).ref
    assert in_memory == saved.model_copy(update={"id": "in memory"})
    with torch.no_grad():
        next(built.parameters()).view(-1)[0] += 1
    assert open_model(built, tp=2, tokenizer=tokenizer).ref.weight_fingerprint != saved.weight_fingerprint


def test_a_model_that_was_loaded_goes_by_its_name(llama, tokenizer):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(llama)
    ref = open_session(str(llama), 2).ref
    assert open_model(loaded, tp=2, tokenizer=tokenizer).ref == ref
    assert open_model(loaded, tp=2, tokenizer=tokenizer, expected=ref).ref == ref
    with pytest.raises(OtherModel, match="the weights differ"):
        open_model(loaded, tp=2, tokenizer=tokenizer, expected=ref.model_copy(update={"weight_fingerprint": "f" * 64}))


def test_it_stays_as_it_was_and_its_weights_are_not_copied(model, tokenizer):
    model.train()
    for parameter in list(model.parameters())[:3]:
        parameter.requires_grad_(False)
    seen = []
    model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    ids = tiny.tokens(2, 12)

    def state():
        modules = [(name, id(m), type(m), m.training) for name, m in model.named_modules()]
        return modules, [(name, id(p), p.requires_grad) for name, p in model.named_parameters()], model.config.to_dict()

    before, weights, logits = state(), copy.deepcopy(model.state_dict()), model.eval()(ids).logits
    model.train()
    profiled = profile(model, tp=2, data="demo", tokenizer=CHARACTERS, text=SHORT, run=CPU)
    planned = plan(profiled, drop=2, model=model, tokenizer=CHARACTERS, run=CPU)
    assert len(planned.drops) == 2
    assert state() == before
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), model.state_dict().values(), strict=True))
    assert torch.equal(model.eval()(ids).logits, logits) and seen

    places = {p.data_ptr() for p in model.parameters()}
    lm = open_model(model, tp=2, tokenizer=tokenizer).load()
    assert {p.untyped_storage().data_ptr() for p in lm.model.parameters()} <= places
    twin = sharing_copy(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True)) and twin is not model


CHARACTERS = tiny.character_tokenizer(vocab=131)


def test_it_measures_what_the_folder_measures(model, text, tmp_path):
    """Profile, plan and results of the object and of the folder it is saved to, to the bit but for the name."""
    folder = tiny.save(model, tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = []
    for given in (str(folder), model):
        named = {} if isinstance(given, str) else {"tokenizer": tokenizer}
        profiled = profile(given, tp=4, data=str(text), text=SHORT, run=CPU, **named)
        planned = plan(profiled, drop=2, model=given, run=CPU, **named)
        results = evaluate(planned, tasks=TaskOptions.of("demo", limit=2), model=given, run=CPU, **named)
        assert check(planned, model=given, **named).ok
        made.append([profiled, planned, results])
    for of_folder, in_memory in zip(*made, strict=True):
        a, b = json.loads(dumps(of_folder)), json.loads(dumps(in_memory))
        assert a["model"].pop("id") == str(folder) and b["model"].pop("id") == "in memory"
        for document in (a, b):  # the plan's own hash is over its model's name as well
            document.pop("plan_sha256", None)
        assert a == b
    (tmp_path / "plan.json").write_text(dumps(made[1][1]))
    assert check(tmp_path / "plan.json", model=folder).ok
    with pytest.raises(InputError, match="was in memory and has no name"):
        check(tmp_path / "plan.json")


def test_it_runs_where_and_as_it_is(model, tokenizer):
    half = model.to(torch.bfloat16)
    session = open_model(half, tp=2, tokenizer=tokenizer)
    run = resolved_for(session, RunOptions())
    assert (run.device, run.dtype) == ("cpu", "bfloat16")
    lm = session.load(run.device, run.dtype, seed=0)
    assert lm.model.dtype == torch.bfloat16
    with pytest.raises(InputError, match="is bfloat16 on cpu, not float32 on cpu"):
        session.load("cpu", "float32")
    with pytest.raises(InputError, match="cannot be read from disk"):
        resolved_for(session, RunOptions(stream=True))


def test_it_generates_plainly_and_refuses_ids_it_has_no_row_for(model, tokenizer):
    model.generation_config.penalty_alpha, model.generation_config.num_beams = 0.6, 4
    before = model.generation_config.to_dict()
    lm = open_model(model, tp=2, tokenizer=tokenizer).load()
    assert (lm.model.generation_config.penalty_alpha, lm.model.generation_config.num_beams) == (None, None)
    assert model.generation_config.to_dict() == before
    with pytest.raises(InputError, match="the token id 131, and the model's embedding has rows 0 to 130"):
        lm(torch.tensor([[3, 131, 4]]))
    with pytest.raises(IndexError):  # its own error, no longer ours
        model(torch.tensor([[3, 131, 4]]))


def broken(how: str) -> nn.Module:
    made = tiny.build("llama")
    if how == "bare":
        return AutoModel.from_config(made.config)
    if how == "mixed":
        made.model.layers[1].to(torch.float16)
    if how == "double":
        made.to(torch.float64)
    if how == "meta":
        made.to("meta")
    if how == "nan":
        made.model.layers[2].mlp.down_proj.weight.data[3, 4] = torch.nan
    if how == "quantised":
        made.config.quantization_config = {"quant_method": "gptq"}
    if how == "wrapped":
        return nn.Sequential(made)
    if how == "lora":
        made.model.layers[0].self_attn.o_proj = nn.Sequential(made.model.layers[0].self_attn.o_proj)
    if how == "pruned":
        made.model.layers = made.model.layers[:3]
    return made


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("bare", "A LlamaModel is no causal language model"),
        ("mixed", "are float16 and float32; load it in"),
        ("double", "are float64"),
        ("meta", "lie on meta"),
        ("nan", "the model in memory hold NaN or Inf, first in block 2, model.layers.2.mlp.down_proj.weight;"),
        ("quantised", "in memory are quantised"),
        ("wrapped", "A Sequential is no causal language model"),
        ("lora", "holds model.layers.0.self_attn.o_proj.0.weight, otherwise"),
        ("pruned", "lacks model.layers.3.self_attn.q_proj.weight, otherwise"),
    ],
)
def test_what_cannot_be_used_is_refused(how, words, tokenizer):
    with pytest.raises(InputError, match=words) as e:
        profile(broken(how), tp=2, data="demo", tokenizer=CHARACTERS, text=SHORT, run=CPU)
    assert "\n" not in str(e.value)


def test_it_needs_a_tokenizer_the_right_ranks_and_no_torchrun(model, tokenizer, monkeypatch):
    with pytest.raises(InputError, match="without its tokenizer"):
        open_model(model, tp=2)
    with pytest.raises(InputError, match="8 query heads"):
        open_model(model, tp=3, tokenizer=tokenizer)
    profiled = profile(model, tp=2, data="demo", tokenizer=CHARACTERS, text=SHORT, run=CPU)
    with pytest.raises(OtherModel, match="the weights differ"):
        plan(profiled, drop=1, model=tiny.build("llama", seed=1), tokenizer=tokenizer)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="simulated ranks alone"):
        open_model(model, tp=2, tokenizer=tokenizer)


def test_a_name_in_a_file_is_looked_for_from_the_working_directory_then_from_the_file(llama, tmp_path, monkeypatch):
    here, run = tmp_path / "here", tmp_path / "run"
    for place in (here / "m", run / "m"):
        shutil.copytree(llama, place)
    (run / "out").mkdir()
    monkeypatch.chdir(here)
    assert place_of("m", run / "p.json") == "m"
    shutil.rmtree(here / "m")
    assert place_of("m", run / "p.json") == str(run / "m")
    assert place_of("m", run / "out/plan.json") == str(run / "m")  # a checkpoint's plan lies in the checkpoint
    assert place_of("m") == "m" and place_of("org/name", run / "p.json") == "org/name"
    assert place_of(str(run / "m"), here / "p.json") == str(run / "m")
    monkeypatch.chdir(run)
    assert place_of("m", here.relative_to(tmp_path) / "p.json") == "m"
    assert place_of("demo", here / "p.json").endswith("demo/model")


def test_a_plan_is_used_from_another_folder_and_of_a_model_that_has_moved(spd, llama, text, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(llama, run / "m")
    shutil.copy(text, run / "t.jsonl")
    monkeypatch.chdir(run)
    sizes = ("--seq-len", 16, "--max-samples", 4, "--verify-samples", 3, "--device", "cpu")
    assert spd("profile", "m", "--tp", 2, "--data", "t.jsonl", *sizes, "-o", "p.json").code == 0
    monkeypatch.chdir(tmp_path)
    cpu = ("--device", "cpu")
    commands = [
        ("plan", "run/p.json", "--drop", 2, "-o", "run/plan.json", *cpu),
        ("check", "run/plan.json"),
        ("eval", "run/plan.json", "--tasks", "demo", "--limit", 2, "-o", "run/results.json", *cpu),
        ("generate", "run/plan.json", "--prompt", "anna had", "--new-tokens", 2, *cpu),
        ("lm-eval", "run", "--model", "spd_calib", "--model_args", "plan=run/plan.json", "--tasks", "spd_demo_who",
         "--include_path", tasks_dir(), "--limit", 2),
    ]  # fmt: skip
    for words in commands:
        outcome = spd(*words)
        assert outcome.code == 0, outcome.err
    assert read(Plan, run / "plan.json").model.id == "m"
    (run / "m").rename(tmp_path / "moved")
    for words in commands[:4]:
        outcome = spd(*words)
        assert outcome.code == 2 and "is no local folder" in outcome.err, outcome.err
        outcome = spd(*words, "--model", "moved")
        assert outcome.code == 0, outcome.err
    assert read(Plan, run / "plan.json").model.id == "m"
    shutil.rmtree(tmp_path / "moved")
    tiny.save(tiny.build("llama", seed=1), tmp_path / "moved")
    outcome = spd(*commands[2], "--model", "moved")
    assert outcome.code == 2 and "moved is not the model this file was made for (m)" in outcome.err


def test_a_document_or_its_file_alike(profile_file):
    from spd_calib.api.opening import document_of
    from spd_calib.formats.profile import Profile

    document, path = document_of(Profile, profile_file)
    assert path == profile_file and document_of(Profile, document) == (document, None)
    assert open_model_of(document, path=path).ref == document.model
    with pytest.raises(InputError, match="A dict is no profile; give a profile, or the path of its file"):
        document_of(Profile, {})


def tasks_dir():
    from spd_calib.demo.assets import tasks_dir as place

    return place()
