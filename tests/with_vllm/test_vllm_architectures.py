"""Every other architecture of the allow-list, under one plan that has every strategy and predictors, and as it is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest
import tiny
import torch
from conftest import SHAPE, WIDTHS, as_configured, build, free_port
from multimodal import save as save_multimodal
from plans import write_plan
from quantised_copies import quantise
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from spd_calib.formats.drops import NOTHING_DROPPED
from spd_calib.models.layer_names import LAYERS
from spd_calib.models.plan_files import load_plan
from spd_calib.models.schemes import scheme_of
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import open_session
from spd_calib.runtimes.observed import Observed
from spd_calib.runtimes.rounding import reading_rounded
from spd_calib.runtimes.vllm.as_served import judge, log_probs, round_weights
from spd_calib.runtimes.vllm.check import compare
from spd_calib.runtimes.vllm.forms import BACKEND, BY_TRANSFORMERS, FORMS, WITH_LANGUAGE_MODEL, is_supported
from spd_calib.runtimes.vllm.processes import vllm_environment

K, D, P = "keep_sync", "block_drop", "plain_drop"
ATTENTION, MLP, KINDS = [D, P, K, D], [D, K, D, K], ["low_rank", None, None, "full"]
NORM_KINDS, MLP_KINDS = ["scaled low_rank", None, None, "scaled full"], ["scaled mean", None, None, None]
ALL_REDUCES = 4  # of 9: three attention sync points are dropped, and two MLPs'
FAMILIES = ("ernie4_5", "phi3", "nemotron", "granite", "hyperclovax", "stablelm")
FAMILIES += ("smollm3", "seed_oss", "hunyuan", "cwm", "starcoder2", "arcee")
NORMS = ("gemma2", "gemma3", "gemma4", "glm4", "exaone4")  # whose branches go through one
FAMILIES += (*NORMS, "qwen3_5")
KINDS_OF_WHOLES = ("llava", "llava_next", "llava_onevision", "internvl", "gemma3", "gemma4", "mistral3")
KINDS_OF_WHOLES += ("qwen3_5", "qwen3_5_moe")
WHOLES = {f"{kind} whole": kind for kind in KINDS_OF_WHOLES}
"""Name -> kind of a model of text and images, which runs the plan of its language model."""
AS_ON_A_GPU = ("llama_bias", "granite")
"""Run a second time with weights that lie open, as on a GPU: what is owed is then added to within the products."""
JOBS = {**{name: (name, False) for name in FAMILIES}, **{f"{name}-in-place": (name, True) for name in AS_ON_A_GPU}}
"""Name -> family, and whether as on a GPU."""
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe")
MIXTURES_BEHIND_DENSE = ("glm4_moe", "ernie4_5_moe", "deepseek_v2", "deepseek_v3")  # block 0 has no experts
MIXTURES += (*MIXTURES_BEHIND_DENSE, "gpt_oss", "qwen3_next", "qwen3_5_moe")
OF_MIXTURES = {"attention": [D, K, D, D], "mlp": [D, D, K, K], "kinds": [None, None, "full", None]}
"""As many sync points; a dropped attention behind a dropped MLP and behind none, with and without predictors."""
ROUTERS = ["low_rank", None, "zero", "full"]
ROUTERS_BEHIND_DENSE = [None, None, "low_rank", "full"]
QUANTISED = ("compressed float8", "compressed int8", "compressed w4a16", "gptq", "awq")
"""Of the schemes those that vLLM's CPU build has kernels for; each in bfloat16, the one dtype they all have."""
ROUNDED = {**dict.fromkeys(QUANTISED, "llama"), "delta-kernel": "qwen3_5"}
"""Name -> family; the last by vLLM's own kernel for linear attention, which has no float32 (delta_in_float32.py)."""
KERNEL = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_value_heads": 4}
"""Heads of a width that this kernel knows."""
LATENT = ("deepseek_v2", "deepseek_v3")
FAULT = "each-rank-routes-by-itself"
PROMPTS = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (21, 9)]
OF_TEXT = [tiny.tokens(1, n, seed=n, vocab=90)[0].tolist() for n in (21, 9)]
"""Without the tokens that stand for images."""
NEW = 4
ROUNDS = 4
"""Of samples of a quantised model, which only many tokens tell from a plan that is almost the same."""


@pytest.fixture(scope="module")
def engines(folder_of, tmp_path_factory):
    """What the engine of each job did, rank by rank: {"planned", "dense", "vocabulary"} or {"error"}."""
    # vLLM names its shared memory after this folder (rank_of_engines.py), and a run that was killed leaves its behind
    place = tmp_path_factory.mktemp(f"engines-{uuid4().hex}")
    jobs = {}
    for name, (family, gpu) in JOBS.items():
        (place / name).mkdir()
        kinds = {"kinds": NORM_KINDS, "mlp_kinds": MLP_KINDS} if family in NORMS else {"kinds": KINDS}
        plan = write_plan(place / name / "plan.json", folder_of(family), 2, ATTENTION, MLP, **kinds)
        jobs[name] = {"folder": str(folder_of(family)), "plan": str(plan), "prompts": PROMPTS, "new": NEW}
        jobs[name]["as_on_a_gpu"] = gpu
    for name in (*MIXTURES, FAULT):
        family = "qwen3_moe" if name == FAULT else name
        (place / name).mkdir()
        routers = ROUTERS_BEHIND_DENSE if family in MIXTURES_BEHIND_DENSE else ROUTERS
        plan = write_plan(place / name / "plan.json", folder_of(family), 2, **OF_MIXTURES, routers=routers)
        jobs[name] = {"folder": str(folder_of(family)), "plan": str(plan), "prompts": PROMPTS, "new": NEW}
        jobs[name] |= {"as_on_a_gpu": False, "route_apart": name == FAULT}
        if name in LATENT:  # its other kernel, of CPUs with AMX, knows bfloat16 alone
            jobs[name]["options"] = {"attention_backend": "CPU_MLA"}
    for name, kind in WHOLES.items():
        folder = place / name / "model"
        save_multimodal(folder, kind, num_hidden_layers=4, **as_configured(SHAPE), **WIDTHS)
        of_kind = OF_MIXTURES | {"routers": ROUTERS} if kind in MIXTURES else {"attention": ATTENTION, "mlp": MLP}
        plan = write_plan(place / name / "plan.json", folder, 2, **of_kind)
        jobs[name] = {"folder": str(folder), "plan": str(plan), "prompts": OF_TEXT, "new": NEW, "as_on_a_gpu": False}
        jobs[name]["options"] = {"language_model_only": True}
    for name, family in ROUNDED.items():
        copy = place / name / "model"
        if name in QUANTISED:
            quantise(Path(shutil.copytree(folder_of(family), copy)), name, group=32)
        else:
            tiny.save(build(family, **KERNEL), copy)
        plan = write_plan(place / name / "plan.json", copy, 2, ATTENTION, MLP, kinds=KINDS)
        jobs[name] = {"folder": str(copy), "plan": str(plan), "prompts": PROMPTS, "new": NEW, "rounds": ROUNDS}
        jobs[name] |= {"as_on_a_gpu": False, "options": {"dtype": "bfloat16"}}
    (place / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("rank_of_engines.py")
    with vllm_environment(2), (place / "log").open("w") as log:
        common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes = [
            subprocess.Popen(
                [sys.executable, script, place / "jobs.json", place / f"{rank}.json"],
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
                stdout=log,
                stderr=log,
            )
            for rank in range(2)
        ]
    try:
        codes = [process.wait(1200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], (place / "log").read_text()[-3000:]
    ranks = [json.loads((place / f"{rank}.json").read_text()) for rank in range(2)]
    return {name: (jobs[name]["plan"], [rank[name] for rank in ranks]) for name in jobs}


@pytest.mark.parametrize("name", JOBS)
def test_an_architecture_runs_its_plan(engines, name):
    (path, ranks), (family, gpu) = engines[name], JOBS[name]
    assert all("error" not in rank for rank in ranks), ranks
    assert [rank.get("in_place") for rank in ranks] == 2 * [[True] if gpu else None]
    lm = TensorParallelLM.simulated(build(family), 2)
    lm.head.cut_at([slice(*rank["vocabulary"][0]) for rank in ranks])  # vLLM pads the vocabulary before it cuts it
    planned, dense = (_observed(ranks, kind) for kind in ("planned", "dense"))
    rows = compare(lm, load_plan(Path(path))[1], prompts=PROMPTS, planned=planned, dense=dense)
    assert not [row for row in rows if not row.ok]
    assert {count for rank in planned.all_reduces for count in rank} == {ALL_REDUCES}
    ignored = compare(lm, NOTHING_DROPPED, prompts=PROMPTS, planned=planned, dense=dense)
    assert "plan: prompt tokens" in {row.what for row in ignored if not row.ok}


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_runs_its_plan(engines, family):
    path, ranks = engines[family]
    rows, planned = _compared(path, ranks, family)
    assert not [row for row in rows if not row.ok]
    assert {count for rank in planned.all_reduces for count in rank} == {ALL_REDUCES}
    assert sum(row.what.endswith("experts the ranks chose") for row in rows) == 2


def has_kernel(name: str) -> bool:
    """Whether the processor has the instructions that vLLM's products by this scheme need."""
    if name in ("compressed w4a16", "gptq", "awq"):
        return torch.cpu._is_avx512_supported()
    return name != "compressed int8" or torch.cpu._is_vnni_supported()


@pytest.mark.parametrize("name", ROUNDED)
def test_an_engine_that_rounds_runs_its_plan(engines, name):
    """Judged as it is served, and with half of the plan's drops taken away it does not pass."""
    path, ranks = engines[name]
    if not has_kernel(name) and "error" in ranks[0]:
        assert all("run the plan on a GPU, or on another CPU." in rank["error"] for rank in ranks), ranks
        pytest.skip(ranks[0]["error"])
    assert all("error" not in rank for rank in ranks), ranks
    session, drops = open_session(str(Path(path).parent / "model"), 2), load_plan(Path(path))[1]
    lm, narrow = (session.load("cpu", dtype) for dtype in ("float32", "bfloat16"))
    for model in (lm, narrow):
        model.head.cut_at([slice(*rank["vocabulary"][0]) for rank in ranks])
    round_weights(lm, "bfloat16")
    samples = [Observed(**sample) for sample in ranks[0]["samples"]]
    reads = scheme.reads if (scheme := scheme_of(session.config)) else ""
    with reading_rounded(narrow, reads):
        rounded = [log_probs(narrow, drops, PROMPTS, sample) for sample in samples]
    assert bool(reads) == (name in ("compressed float8", "compressed int8"))
    told = {"prompts": PROMPTS, "samples": samples, "rounded": rounded, "dtype": "bfloat16"}
    assert not [row for row in judge(lm, drops, **told) if not row.ok]
    assert [row for row in judge(lm, drops.only(list(drops)[::2]), **told) if not row.ok]
    assert {count for rank in ranks for counts in rank["planned"]["all_reduces"] for count in counts} == {ALL_REDUCES}


@pytest.mark.parametrize("name", WHOLES)
def test_a_model_of_text_and_images_runs_the_plan_of_its_language_model(engines, name):
    path, ranks = engines[name]
    assert all("error" not in rank for rank in ranks), ranks
    lm = open_session(str(Path(path).parent / "model"), 2).load()
    lm.head.cut_at([slice(*rank["vocabulary"][0]) for rank in ranks])
    planned, dense = (_observed(ranks, kind) for kind in ("planned", "dense"))
    rows = compare(lm, load_plan(Path(path))[1], prompts=OF_TEXT, planned=planned, dense=dense)
    assert not [row for row in rows if not row.ok]
    assert {count for rank in planned.all_reduces for count in rank} == {ALL_REDUCES}


def test_ranks_that_each_route_by_their_own_stream_are_caught(engines):
    rows, _ = _compared(*engines[FAULT], "qwen3_moe")
    wrong = {row.what: row.found for row in rows if not row.ok}
    assert wrong["plan: experts the ranks chose"] == "differ from block 0 on"
    assert not any(what.startswith("dense") for what in wrong)


def _compared(path: str, ranks: list, family: str) -> tuple[list, Observed]:
    assert all("error" not in rank for rank in ranks), ranks
    lm = TensorParallelLM.simulated(build(family), 2)
    lm.head.cut_at([slice(*rank["vocabulary"][0]) for rank in ranks])
    planned, dense = (_observed(ranks, kind) for kind in ("planned", "dense"))
    return compare(lm, load_plan(Path(path))[1], prompts=PROMPTS, planned=planned, dense=dense), planned


def _observed(ranks: list, kind: str) -> Observed:
    """What rank 0 saw, with the all-reduces of both."""
    first, second = (Observed(**rank[kind]) for rank in ranks)
    assert first.tokens == second.tokens
    both = {field: [*getattr(first, field), *getattr(second, field)] for field in ("all_reduces", "experts")}
    return first.model_copy(update=both)


def test_every_architecture_is_tested_here_or_with_the_plans():
    with_the_plans = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "OPT")
    here = {type(build(family)).__name__ for family in (*FAMILIES, *MIXTURES)}
    assert here | {f"{name}ForCausalLM" for name in with_the_plans} == {*FORMS, *BY_TRANSFORMERS}
    assert {name for row in LAYERS.values() for name in row.classes} >= {*BY_TRANSFORMERS}
    assert {MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind] for kind in WHOLES.values()} == {*WITH_LANGUAGE_MODEL}
    assert is_supported(BACKEND, "ArceeForCausalLM") and not is_supported(BACKEND, "LlamaForCausalLM")
