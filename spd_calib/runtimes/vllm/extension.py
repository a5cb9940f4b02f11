"""Methods that `check` and `bench` give every worker through `worker_extension_cls`; no server has them.

None raises: an error that leaves a worker method puts vLLM's later replies out of step. They return it instead.
"""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

from .collectives import time_all_reduces
from .find import find, language_model_of
from .layers import apply, share
from .mixtures import logits_of
from .worker import drops_of_this_rank

TRACED: dict[str, list[int]] = {"vllm": [], "torch": []}
"""All-reduces in each graph that a compiler was given in this process; vLLM's hands pieces of its own to torch's."""


class CheckExtension:
    def spd_set(self: Any, rows: list[dict[str, Any]], predictors_of: str | None = None) -> str | None:
        """Swap drops (rows.to_rows) in, in place; return None, or what went wrong.

        In eager mode only: compiled code would not notice. `predictors_of`: path of a plan whose predictors are used.
        """
        try:
            drops = drops_of_this_rank(rows, Path(predictors_of) if predictors_of else None)
            apply(self.model_runner.get_model(), drops)
            share(self.model_runner.get_model())
        except Exception as e:
            return f"{type(e).__name__}: {e}"
        return None

    def spd_all_reduces(self: Any) -> list[int] | str:
        """Return the all-reduces of each forward since the last call, on this rank; the first call starts counting."""
        try:
            counts = vars(self).setdefault("spd_counts", [])
            if "spd_counting" not in vars(self):
                self.spd_counting = True
                _count(self.model_runner.get_model(), counts)
            made = list(counts)
            counts.clear()
        except Exception as e:
            return f"{type(e).__name__}: {e}"
        return made

    def spd_experts(self: Any) -> list[str] | str:
        """Return a digest of the experts chosen in each mixture since the last call, on this rank.

        The first call starts watching. Empty without mixtures, or where the model is compiled.
        """
        try:
            if "spd_chosen" not in vars(self):
                self.spd_chosen: list[Any] = []
                _watch_routers(self.model_runner.get_model(), self.spd_chosen)
            digests = [digest.hexdigest() for digest in self.spd_chosen]
            self.spd_chosen[:] = [hashlib.sha256() for _ in digests]
        except Exception as e:
            return f"{type(e).__name__}: {e}"
        return digests

    def spd_traced_all_reduces(self: Any) -> int:
        """Return the all-reduces in the graph that was compiled of the model, 0 where none was."""
        return max(TRACED["vllm"] or TRACED["torch"], default=0)

    def spd_time_all_reduces(self: Any, sizes: list[int], rounds: int, graphs: bool) -> list[list[float]] | str:
        """Return the seconds of an all-reduce of each of `sizes` bytes on this rank, round by round."""
        try:
            model_runner = self.model_runner
            times = time_all_reduces(
                sizes, rounds=rounds, dtype=model_runner.dtype, device=model_runner.device, graphs=graphs
            )
        except Exception as e:
            return f"{type(e).__name__}: {e}"
        return times

    def spd_vocabulary(self: Any) -> list[int] | str:
        """Return the first token id, and the one behind the last, that this rank's part of the output head computes."""
        try:
            model = language_model_of(self.model_runner.get_model())
            head = model.lm_head if hasattr(model, "lm_head") else model.model.embed_tokens  # where they are tied
            part = head.shard_indices
        except Exception as e:
            return f"{type(e).__name__}: {e}"
        return [part.org_vocab_start_index, part.org_vocab_end_index]

    def spd_shared_memory(self: Any) -> str:
        """Return what the names of this engine's files in /dev/shm contain, or ''."""
        return os.environ.get("VLLM_DIST_IDENT", "")


def _count(model: Any, counts: list[int]) -> None:
    """Count at the communicator of the TP group, below everything that could call it.

    A compiled model is left alone: its all-reduces are counted where it is traced.
    """
    from vllm.distributed import get_tp_group

    communicator = get_tp_group().device_communicator
    if communicator is None or not getattr(model, "do_not_compile", True):  # there is none with one rank
        return
    reduce, forward, embed = communicator.all_reduce, model.forward, model.embed_input_ids
    embedded = False

    def all_reduce(*args: Any, **kwargs: Any) -> Any:
        if counts:
            counts[-1] += 1
        return reduce(*args, **kwargs)

    @functools.wraps(forward)  # vLLM looks at its parameters
    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal embedded
        if not embedded:
            counts.append(0)
        embedded = False
        return forward(*args, **kwargs)

    @functools.wraps(embed)
    def embedding(*args: Any, **kwargs: Any) -> Any:
        nonlocal embedded
        counts.append(0)
        embedded = True
        return embed(*args, **kwargs)

    communicator.all_reduce, model.forward = all_reduce, counting
    if language_model_of(model) is not model:  # the embedding is then called in front of the forward
        model.embed_input_ids = embedding


def _watch_routers(model: Any, chosen: list[Any]) -> None:
    """Have each router of an eager model add the experts that it chooses to its digest in `chosen`."""
    form, layers = find(model)
    found = [mixture for layer in layers if (mixture := form.mixture_of(layer)) is not None]
    if not getattr(model, "do_not_compile", True):
        return
    chosen += [hashlib.sha256() for _ in found]
    for i, mixture in enumerate(found):
        runner: Any = mixture.experts

        def add(gate: Any, args: Any, given: Any, i: int = i, router: Any = runner.router) -> None:
            _, experts = router._compute_routing(args[0], logits_of(given), None)
            chosen[i].update(experts.sort(-1).values.cpu().numpy().tobytes())

        mixture.get_submodule(form.gate).register_forward_hook(add)


def _count_traced() -> None:
    """Have every graph counted that is given to vLLM's own compiler from now on, or to torch's where vLLM uses that."""
    from torch._inductor import compile_fx
    from vllm.compilation.backends import VllmBackend

    inductor: Any = compile_fx
    by_vllm, by_torch = VllmBackend.__call__, inductor.compile_fx

    def vllm_compiles(self: Any, graph: Any, example_inputs: Any) -> Any:
        TRACED["vllm"].append(_all_reduces(graph))
        return by_vllm(self, graph, example_inputs)

    def torch_compiles(graph: Any, *args: Any, **kwargs: Any) -> Any:
        TRACED["torch"].append(_all_reduces(graph))
        return by_torch(graph, *args, **kwargs)

    VllmBackend.__call__, inductor.compile_fx = vllm_compiles, torch_compiles


def _all_reduces(graph: Any) -> int:
    """Return the number of all-reduces in a torch.fx.GraphModule, by the names that their operators have."""
    nodes = getattr(getattr(graph, "graph", None), "nodes", ())
    names = (str(node.target) for node in nodes if node.op == "call_function")
    return sum("all_reduce" in name or "allreduce" in name for name in names)


_count_traced()  # a worker imports this module before it loads the model
