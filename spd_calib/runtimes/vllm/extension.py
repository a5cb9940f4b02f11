"""Methods that `check` gives every worker through `worker_extension_cls`; no server has them.

None raises: an error that leaves a worker method puts vLLM's later replies out of step. They return it instead.
"""

import os
from pathlib import Path
from typing import Any

from .layers import apply
from .worker import drops_of_this_rank


class CheckExtension:
    def spd_set(self: Any, rows: list[dict[str, Any]], predictors_of: str | None = None) -> str | None:
        """Swap drops (rows.to_rows) in, in place; return None, or what went wrong.

        In eager mode only: compiled code would not notice. `predictors_of`: path of a plan whose predictors are used.
        """
        try:
            drops = drops_of_this_rank(rows, Path(predictors_of) if predictors_of else None)
            apply(self.model_runner.get_model(), drops)
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

    def spd_vocabulary(self: Any) -> list[int] | str:
        """Return the first token id, and the one behind the last, that this rank's part of the output head computes."""
        try:
            part = self.model_runner.get_model().lm_head.shard_indices
        except Exception as e:
            return f"{type(e).__name__}: {e}"
        return [part.org_vocab_start_index, part.org_vocab_end_index]

    def spd_shared_memory(self: Any) -> str:
        """Return what the names of this engine's files in /dev/shm contain, or ''."""
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
