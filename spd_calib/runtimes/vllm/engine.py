"""Starting a vLLM engine for a check or a bench, on loopback, and cleaning up afterwards."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from spd_calib.errors import InputError, SpdError
from spd_calib.formats.drops import Drops
from spd_calib.runtimes.observed import Observed

from .processes import errors_in_a_file, remove_shared_memory, root_cause, vllm_environment
from .rows import to_rows

EXTENSION = "spd_calib.runtimes.vllm.extension.CheckExtension"


class Engine:
    """A running engine; `with start(...) as engine`."""

    def __init__(self, llm: Any):
        self.llm = llm
        self.call("spd_all_reduces")

    @property
    def dtype(self) -> str:
        """Return the dtype that the engine computes in, by torch's name without "torch."."""
        return str(self.llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch.")

    def set(self, drops: Drops, *, predictors_of: Path | None = None) -> None:
        """Swap the strategies of `drops` in, in place, with the predictors that the plan `predictors_of` has for them.

        Predictors in `drops` itself are not looked at: every worker reads its own from the plan's file. Raises SpdError
        where a worker could not.
        """
        self.call("spd_set", to_rows(drops), predictors_of and str(predictors_of))

    def observe(self, prompts: Sequence[Sequence[int]], *, new_tokens: int, seed: int | None = None) -> Observed:
        """Run prompts of token ids, and continue each by `new_tokens`: the likeliest, or with a `seed` sampled ones."""
        from vllm import SamplingParams

        self.call("spd_all_reduces")
        self.call("spd_experts")
        common = {
            "max_tokens": new_tokens,
            "ignore_eos": True,
            "prompt_logprobs": 0,
            "logprobs": 0,
            "detokenize": False,
        }
        params = SamplingParams(temperature=0 if seed is None else 1, seed=seed, **common)
        outputs = self.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
        tokens = [list(o.outputs[0].token_ids) for o in outputs]
        return Observed(
            prompt=[_of(o.prompt_logprobs[1:], p[1:]) for o, p in zip(outputs, prompts, strict=True)],
            tokens=tokens,
            chosen=[_of(o.outputs[0].logprobs, t) for o, t in zip(outputs, tokens, strict=True)],
            all_reduces=self.call("spd_all_reduces"),
            experts=[of_rank for of_rank in self.call("spd_experts") if of_rank],
        )

    def vocabulary(self) -> list[slice]:
        """Return the part of the vocabulary that each rank's output head computes."""
        return [slice(*part) for part in self.call("spd_vocabulary")]

    def traced_all_reduces(self) -> list[int]:
        """Return how many all-reduces stand in the compiled graphs of each rank: 0 where nothing was compiled."""
        return self.call("spd_traced_all_reduces")

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

    Eager and in float32, unless `options` say otherwise. Raises InputError where vLLM is not installed or the plan is
    refused, SpdError where vLLM does not start, or dies.
    """
    settings: dict[str, Any] = {
        "tensor_parallel_size": tp,
        "max_model_len": max_length,
        "dtype": "float32",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "logprobs_mode": "raw_logprobs",
        **options,
    }
    with vllm_environment(tp), _running(folder, settings, plan=plan) as engine:
        yield engine


@contextmanager
def start_served(
    folder: Path, *, tp: int, plan: Path | None, arguments: Sequence[str], longest: int
) -> Iterator[Engine]:
    """Start vLLM on a model folder as `vllm serve` with these `arguments` would, with a plan at TP size `tp`.

    `longest`: the tokens that a sequence will have. Raises InputError where vLLM is not installed, does not know an
    argument or serves shorter sequences only, or where the plan is refused, SpdError where vLLM does not start, or
    dies.
    """
    # a graph that comes out of a cache is not traced, and its all-reduces could not be counted
    with vllm_environment(tp, VLLM_DISABLE_COMPILE_CACHE="1"):
        settings = {**_parsed(arguments), "tensor_parallel_size": tp, "logprobs_mode": "raw_logprobs"}
        with _running(folder, settings, plan=plan) as engine:
            limit = engine.llm.llm_engine.vllm_config.model_config.max_model_len
            if longest > limit:
                raise InputError(f"vLLM serves sequences of {limit} tokens here, and the check's have {longest}.")
            yield engine


def _parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """Return what `vllm serve` would make of these arguments, those that are not vLLM's defaults."""
    _import_vllm()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(exit_on_error=False, add_help=False))
    try:
        known, unknown = parser.parse_known_args(list(arguments))
    except (Exception, SystemExit) as e:
        raise InputError(f"vLLM cannot use the arguments {' '.join(arguments)!r}: {e}.") from None
    if unknown:
        raise InputError(f"vLLM knows no argument {unknown[0]!r}; name those of `vllm serve` that make the engine.")
    default, given = EngineArgs(), EngineArgs.from_cli_args(known)
    return {
        field.name: getattr(given, field.name)
        for field in fields(EngineArgs)
        if field.name != "model" and getattr(given, field.name) != getattr(default, field.name)
    }


def _import_vllm() -> Any:
    """Return the vllm package; raises InputError where it is not installed."""
    try:
        import vllm
    except ImportError:
        raise InputError(
            "vLLM is not installed beside spd-calib here; `make .venv-vllm` builds an environment that has both."
        ) from None
    return vllm


@contextmanager
def _running(folder: Path, settings: dict[str, Any], *, plan: Path | None) -> Iterator[Engine]:
    """Start vLLM's LLM with these settings and a plan, and end it afterwards; see `start`."""
    if plan is not None:
        settings = {**settings, "additional_config": {**settings.get("additional_config", {}), "spd_plan": str(plan)}}
    settings = {**settings, "worker_extension_cls": settings.get("worker_extension_cls") or EXTENSION}
    with errors_in_a_file() as log:
        vllm = _import_vllm()
        try:
            llm = vllm.LLM(str(folder), disable_log_stats=True, **settings)
        except SpdError:
            raise
        except Exception as e:
            reason = root_cause(log) or (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".")
            raise SpdError(f"vLLM did not start: {reason}; its own messages stand above.") from e
        names = set()
        try:
            engine = Engine(llm)
            names = set(llm.collective_rpc("spd_shared_memory"))
            yield engine
        except Exception as e:
            if not type(e).__module__.startswith("vllm."):
                raise
            reason = root_cause(log) or type(e).__name__
            raise SpdError(f"vLLM died: {reason}; its own messages stand above.") from e
        finally:
            llm.llm_engine.engine_core.shutdown()
            remove_shared_memory(names)
