"""A checkpoint that `recover` wrote: its plan and predictors, and the dense model that it was made from."""

from dataclasses import dataclass
from pathlib import Path

from spd_calib.errors import InputError
from spd_calib.formats.files import read, sha256_of, write_bytes
from spd_calib.formats.plan import CompensationFile, Plan
from spd_calib.formats.profile import Comparison, Point, Profile
from spd_calib.formats.profile import Recovered as RecoveredPart
from spd_calib.parallel.compensation import load_compensation
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import Session, check_same_model, open_session

from .options import resolve_model


@dataclass(frozen=True)
class Recovered:
    """`plan`, read from `path`, which lies in the checkpoint."""

    plan: Plan
    path: Path

    @property
    def sha256(self) -> str:
        return sha256_of(self.path)

    def load(
        self, session: Session, device: str, dtype: str, seed: int, stream: bool = False
    ) -> tuple[TensorParallelLM, TensorParallelLM]:
        """The recovered model, what its plan drops settled as dropped, and the dense one it was made from."""
        lm = session.load(device, dtype, seed, stream)
        lm.set_compensation(load_compensation(self.plan, self.path, lm.comm.ranks))
        lm.settle(self.plan.strategies, self.plan.mlp_strategies)
        return lm, load_original(self.plan, device, dtype, seed, stream)

    def check_profiling(self, method: str, confidence: float | None, tasks: str | None, data: list[str]) -> None:
        if method != "single" or confidence is not None or tasks or len(data) > 1:
            raise InputError(
                "A recovered checkpoint is profiled by --method single on one --data, without --confidence and "
                "--tasks: leave them out."
            )

    def beyond_fitted(
        self, data: str, seq_len: int | None, min_len: int | None, pack: bool
    ) -> tuple[int, int | None, int | None, bool]:
        """How many sequences of `data` it was fitted on, at the beginning; and the lengths, by default those of then.

        Raises InputError where it was fitted on `data` in other lengths.
        """
        text = self.plan.verified.text
        if Path(text.source).expanduser().absolute() != Path(data).expanduser().absolute():
            return 0, seq_len, min_len, pack
        if (seq_len or text.seq_len, min_len or text.min_len, pack or text.pack) != (
            text.seq_len,
            text.min_len,
            text.pack,
        ):
            raise InputError(
                f"{data} was fitted on in other lengths, and cannot be told from the rest; leave out --seq-len, "
                "--min-len and --pack, or give other text."
            )
        return text.first, text.seq_len, text.min_len, text.pack

    def said(self, skip: int) -> str:
        assert self.plan.recovered_from is not None
        n = len(self.plan.dropped) + len(self.plan.mlp_dropped)
        said = f"recovered from {self.plan.recovered_from.id}, which everything is compared with; {n} sync points stay "
        return said + (
            "dropped" if not skip else f"dropped; the first {skip} sequences were fitted on, they are left out"
        )

    def part(self, alone: Comparison) -> RecoveredPart:
        """What the profile says of it."""
        assert self.plan.recovered_from is not None
        strategies = {"attention": self.plan.dropped, "mlp": self.plan.mlp_dropped}
        return RecoveredPart(
            recovered_from=self.plan.recovered_from,
            plan_sha256=self.sha256,
            settled=[Point(block=b, sync_point=kind) for kind, blocks in strategies.items() for b in blocks],  # type: ignore[arg-type]
            alone=alone,
        )

    def predictors_beside(self, plan: Path) -> CompensationFile | None:
        """Copy the predictors into the folder of another plan of this checkpoint, under a name of their own."""
        own = self.plan.compensation
        if own is None:
            return None
        name = f"compensation-{own.sha256[:12]}.safetensors"
        write_bytes(plan.parent / name, (self.path.parent / own.file).read_bytes())
        return CompensationFile(file=name, sha256=own.sha256)


def find_recovered(session: Session) -> Recovered | None:
    """What `recover` left in the session's folder; None where it did not write it.

    Raises InputError where the weights are not those it wrote, or for another TP size than its plan's.
    """
    path = session.source.folder / "plan.json"
    if not path.is_file() or b'"spd-calib/plan"' not in path.read_bytes():
        return None
    plan = read(Plan, path)
    if plan.recovered_from is None:
        return None
    check_same_model(plan.model, session.ref)
    if plan.tensor_parallel.size != session.tp:
        raise InputError(
            f"{session.source.folder} was recovered for {plan.tensor_parallel.size} ranks, not for {session.tp}; "
            f"give --tp {plan.tensor_parallel.size}."
        )
    return Recovered(plan, path)


def load_original(plan: Plan, device: str, dtype: str, seed: int, stream: bool = False) -> TensorParallelLM:
    """The dense model that a recovered checkpoint was made from, on as many ranks."""
    assert plan.recovered_from is not None
    original = resolve_model(plan.recovered_from.id)
    return open_session(original, plan.tensor_parallel.size, plan.recovered_from).load(device, dtype, seed, stream)


def open_profiled(profile: Profile) -> tuple[Session, Recovered | None]:
    """The model a profile is of, and what `recover` left in its folder, where that was profiled.

    Raises InputError where it is no longer the one profiled.
    """
    session = open_session(resolve_model(profile.model.id), profile.tensor_parallel.size, profile.model)
    if profile.recovered is None:
        return session, None
    recovered = find_recovered(session)
    if recovered is None or recovered.sha256 != profile.recovered.plan_sha256:
        raise InputError(f"{session.source.folder} has another plan.json than when it was profiled; profile again.")
    return session, recovered
