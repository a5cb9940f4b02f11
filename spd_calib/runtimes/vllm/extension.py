"""Methods that `check` gives every worker through `worker_extension_cls`; no server has them.

None raises: an error that leaves a worker method puts vLLM's later replies out of step. They return it instead.
"""

import os
from pathlib import Path
from typing import Any

from .layers import apply
from .worker import of_this_rank


class CheckExtension:
    def spd_set(self: Any, attention: list[str], mlp: list[str], compensated: str | None = None) -> str | None:
        """Swap the plan in place (eager mode only: compiled code would not notice); None, or what went wrong.

        `compensated`: path of a plan whose predictors are to be used.
        """
        try:
            predictors = of_this_rank(Path(compensated)) if compensated else {}
            apply(self.model_runner.get_model(), attention, mlp, predictors)
        except Exception as e:
            return f"{type(e).__name__}: {e}"
        return None

    def spd_all_reduces(self: Any) -> list[int] | str:
        """All-reduces of each forward since the last call, on this rank; the first call starts the counting."""
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

    def spd_vocabulary(self: Any) -> list[int] | str:
        """First token id and the one behind the last that this rank's part of the output head computes."""
        try:
            part = self.model_runner.get_model().lm_head.shard_indices
        except Exception as e:
            return f"{type(e).__name__}: {e}"
        return [part.org_vocab_start_index, part.org_vocab_end_index]

    def spd_shared_memory(self: Any) -> str:
        """What the names of this engine's files in /dev/shm contain, or nothing."""
        return os.environ.get("VLLM_DIST_IDENT", "")


def _count(model: Any, counts: list[int]) -> None:
    """Count at the communicator of the TP group, below everything that could call it."""
    from vllm.distributed import get_tp_group

    communicator = get_tp_group().device_communicator
    if communicator is not None:  # there is none with one rank
        original = communicator.all_reduce

        def all_reduce(*args: Any, **kwargs: Any) -> Any:
            if counts:
                counts[-1] += 1
            return original(*args, **kwargs)

        communicator.all_reduce = all_reduce
    model.register_forward_pre_hook(lambda module, args: counts.append(0))
