"""One vLLM engine, started to be looked at: eager, float32, on loopback, gone without a trace."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spd_calib.errors import InputError, SpdError

EXTENSION = "spd_calib.runtimes.vllm.extension.CheckExtension"


@dataclass(frozen=True)
class Seen:
    """What an engine did with some prompts; one list a prompt."""

    prompt: list[list[float]]  # log p of every prompt token but the first
    tokens: list[list[int]]  # greedy continuation
    chosen: list[list[float]]  # log p of its tokens
    all_reduces: list[list[int]]  # one list a rank: how many in each forward
    vocabulary: list[list[int]]  # one pair a rank: the first token of its part of the head, and the one behind the last


class Engine:
    """A running engine; `with start(...) as engine`."""

    def __init__(self, llm: Any):
        self.llm = llm
        self._call("spd_all_reduces")

    def set(self, attention: Sequence[str], mlp: Sequence[str] | None = None, compensated: Path | None = None) -> None:
        """Swap the plan in place, with the predictors beside the plan `compensated`, if given.

        Raises SpdError where a worker could not.
        """
        mlp = mlp or ["keep_sync"] * len(attention)
        self._call("spd_set", list(map(str, attention)), list(map(str, mlp)), compensated and str(compensated))

    def see(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Seen:
        """Run prompts of token ids, and continue each by `new_tokens` greedy ones."""
        from vllm import SamplingParams

        self._call("spd_all_reduces")
        greedy = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, prompt_logprobs=0, logprobs=0, detokenize=False
        )
        outputs = self.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], greedy, use_tqdm=False)
        tokens = [list(o.outputs[0].token_ids) for o in outputs]
        return Seen(
            prompt=[_of(o.prompt_logprobs[1:], p[1:]) for o, p in zip(outputs, prompts, strict=True)],
            tokens=tokens,
            chosen=[_of(o.outputs[0].logprobs, t) for o, t in zip(outputs, tokens, strict=True)],
            all_reduces=self._call("spd_all_reduces"),
            vocabulary=self._call("spd_vocabulary"),
        )

    def _call(self, method: str, *args: Any) -> list[Any]:
        """What each rank's CheckExtension returns. Raises SpdError where that is an error."""
        results = self.llm.collective_rpc(method, args=args)
        if errors := [r for r in results if isinstance(r, str)]:
            raise SpdError(f"vLLM's workers report: {errors[0]}")
        return results


def _of(positions: Sequence[dict[int, Any]], tokens: Sequence[int]) -> list[float]:
    return [float(p[t].logprob) for p, t in zip(positions, tokens, strict=True)]


@contextmanager
def start(folder: Path, tp: int, max_length: int, plan: Path | None = None, **options: Any) -> Iterator[Engine]:
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
    with _environment(tp):
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
            _remove(names)


@contextmanager
def _environment(tp: int) -> Iterator[None]:
    """Settings vLLM reads from the environment, where the user has not made them; taken back afterwards."""
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


def _remove(names: set[str]) -> None:
    """The shared memory files of this engine, which vLLM leaves behind when its processes are ended."""
    for folder in (Path("/dev/shm"), Path("/tmp")):
        for path in folder.glob("vllm_dist_*"):
            if any(name and path.name.startswith(name) for name in names):
                path.unlink(missing_ok=True)
