"""Starting a vLLM engine for a check: eager, in float32, on loopback, and cleaned up afterwards."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spd_calib.errors import InputError, SpdError
from spd_calib.formats.drops import Drops
from spd_calib.runtimes.observed import Observed

from .rows import to_rows

EXTENSION = "spd_calib.runtimes.vllm.extension.CheckExtension"


class Engine:
    """A running engine; `with start(...) as engine`."""

    def __init__(self, llm: Any):
        self.llm = llm
        self.call("spd_all_reduces")

    def set(self, drops: Drops, *, predictors_of: Path | None = None) -> None:
        """Swap the strategies of `drops` in, in place, with the predictors that the plan `predictors_of` has for them.

        Predictors in `drops` itself are not looked at: every worker reads its own from the plan's file. Raises SpdError
        where a worker could not.
        """
        self.call("spd_set", to_rows(drops), predictors_of and str(predictors_of))

    def observe(self, prompts: Sequence[Sequence[int]], *, new_tokens: int) -> Observed:
        """Run prompts of token ids, and continue each by `new_tokens` greedy ones."""
        from vllm import SamplingParams

        self.call("spd_all_reduces")
        greedy = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, prompt_logprobs=0, logprobs=0, detokenize=False
        )
        outputs = self.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], greedy, use_tqdm=False)
        tokens = [list(o.outputs[0].token_ids) for o in outputs]
        return Observed(
            prompt=[_of(o.prompt_logprobs[1:], p[1:]) for o, p in zip(outputs, prompts, strict=True)],
            tokens=tokens,
            chosen=[_of(o.outputs[0].logprobs, t) for o, t in zip(outputs, tokens, strict=True)],
            all_reduces=self.call("spd_all_reduces"),
        )

    def vocabulary(self) -> list[slice]:
        """Return the part of the vocabulary that each rank's output head computes."""
        return [slice(*part) for part in self.call("spd_vocabulary")]

    def call(self, method: str, *args: Any) -> list[Any]:
        """Return what each rank's worker extension returns. Raises SpdError where that is an error."""
        results = self.llm.collective_rpc(method, args=args)
        if errors := [r for r in results if isinstance(r, str)]:
            raise SpdError(f"vLLM's workers report: {errors[0]}")
        return results


def _of(positions: Sequence[dict[int, Any]], tokens: Sequence[int]) -> list[float]:
    return [float(p[t].logprob) for p, t in zip(positions, tokens, strict=True)]


@contextmanager
def start(folder: Path, *, tp: int, max_length: int, plan: Path | None = None, **options: Any) -> Iterator[Engine]:
    """Start vLLM on a model folder, with a plan as `vllm serve --additional-config` would; `options` as LLM's own.

    Raises InputError where vLLM is not installed or the plan is refused, SpdError where vLLM does not start.
    """
    if plan is not None:
        options["additional_config"] = {"spd_plan": str(plan)}
    settings: dict[str, Any] = {
        "tensor_parallel_size": tp,
        "max_model_len": max_length,
        "dtype": "float32",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "logprobs_mode": "raw_logprobs",
        "worker_extension_cls": EXTENSION,
        "disable_log_stats": True,
        **options,
    }
    with vllm_environment(tp):
        try:
            from vllm import LLM
        except ImportError:
            raise InputError(
                "vLLM is not installed beside spd-calib here; `make .venv-vllm` builds an environment that has both."
            ) from None
        try:
            llm = LLM(str(folder), **settings)
        except SpdError:
            raise
        except Exception as e:
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".")
            raise SpdError(f"vLLM did not start: {reason}; its own messages stand above.") from e
        names = set()
        try:
            engine = Engine(llm)
            names = set(llm.collective_rpc("spd_shared_memory"))
            yield engine
        finally:
            llm.llm_engine.engine_core.shutdown()
            remove_shared_memory(names)


@contextmanager
def vllm_environment(tp: int) -> Iterator[None]:
    """Make the settings that vLLM reads from the environment, where the user has not; taken back afterwards."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // tp)
    bound = [",".join(str(cores[(rank * share + i) % len(cores)]) for i in range(share)) for rank in range(tp)]
    wanted = {
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(bound),
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    added = {k: v for k, v in wanted.items() if k not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def remove_shared_memory(names: set[str]) -> None:
    """Remove an engine's shared memory files, which vLLM leaves behind when its processes are ended."""
    for folder in (Path("/dev/shm"), Path("/tmp")):
        for path in folder.glob("vllm_dist_*"):
            if any(name and path.name.startswith(name) for name in names):
                path.unlink(missing_ok=True)
