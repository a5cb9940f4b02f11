"""Sums over ranks: simulated ones in one process, real ones in two."""

import pytest
import torch
import torch.distributed as dist
from two_processes import in_processes, in_two_processes

from spd_calib.errors import SpdError
from spd_calib.parallel.comm import GATHERED_AT_MOST, DistributedComm, SimulatedComm


def test_simulated_ranks_sum_in_their_order():
    comm = SimulatedComm(3)
    parts = [torch.tensor([1e8]), torch.tensor([1.0]), torch.tensor([-1e8])]
    assert comm.all_reduce(iter(parts)).item() == 0.0 and comm.all_reduces == 1  # (1e8 + 1) - 1e8 in float32
    assert comm.all_reduce(iter(parts)).item() == 0.0 and comm.all_reduces == 2
    assert [p.item() for p in parts] == [1e8, 1.0, -1e8]  # as they were
    assert torch.equal(comm.all_gather([torch.ones(2, 1), torch.zeros(2, 2)]), torch.tensor([[1.0, 0, 0]] * 2))
    assert list(comm.ranks) == [0, 1, 2] and comm.size == 3


def test_one_real_rank_sums_alone(tmp_path):
    """A group of one: what is reduced is its own, in a tensor of its own, and counted."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        comm = DistributedComm()
        for limit in (0, 2**15):
            comm.gathered_at_most = limit
            own = torch.randn(4, 3).T
            total = comm.all_reduce([own])
            assert torch.equal(total, own) and total.data_ptr() != own.data_ptr() and total.is_contiguous()
        assert (comm.all_reduces, comm.elements, comm.bytes) == (2, 24, 96)
        part = torch.randn(2, 3, 4)
        assert torch.equal(comm.all_gather([part]), part)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("size", [5, GATHERED_AT_MOST // 4, GATHERED_AT_MOST // 4 + 1])
def test_two_processes_have_the_same_sum(size, tmp_path, monkeypatch):
    """Small messages are gathered and summed, larger ones all-reduced: never the other way round."""
    parts = [torch.randn(size, 2, generator=torch.Generator().manual_seed(r)).T[:1] for r in (0, 1)]

    def work(rank: int) -> None:
        comm = DistributedComm()
        assert (comm.size, comm.rank, list(comm.ranks), comm.all_reduces) == (2, rank, [rank], 0)
        used = []
        for name in ("all_reduce", "all_gather"):
            do = getattr(dist, name)
            monkeypatch.setattr(dist, name, lambda *a, do=do, name=name: used.append(name) or do(*a))
        own = parts[rank].clone()
        total = comm.all_reduce([own])
        assert torch.equal(total, parts[0] + parts[1]) and torch.equal(own, parts[rank])
        assert comm.all_reduces == 1 and used == ["all_gather" if own.nbytes <= 2**15 else "all_reduce"]
        assert torch.equal(comm.all_gather([own]), torch.cat(parts, dim=-1)) and comm.all_reduces == 1
        assert torch.equal(comm.all_gather([own[None]]), torch.cat(parts, dim=-1)[None])

    in_two_processes(tmp_path / "store", work)


@pytest.mark.parametrize("one_shot_at_most", [0, 2**15])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_quantised_sync_of_processes_is_that_of_simulated_ranks(ranks, one_shot_at_most, tmp_path):
    """Seven tokens of two groups; in two shots three ranks share the 14 groups, the last has fewer."""
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(7, 100, generator=draw).bfloat16() for _ in range(ranks)]
    simulated = SimulatedComm(ranks)
    simulated.one_shot_at_most = one_shot_at_most
    expected = [simulated.all_reduce(iter(parts), bits=bits) for bits in (4, 6)]

    def work(rank: int) -> None:
        comm = DistributedComm()
        comm.one_shot_at_most = one_shot_at_most
        found = [comm.all_reduce([parts[rank]], bits=bits) for bits in (4, 6)]
        assert all(map(torch.equal, found, expected)) and found[0].dtype == torch.bfloat16
        assert (comm.all_reduces, comm.elements, comm.bytes) == (2, 1400, 14 * (64 * 4 // 8 + 3 + 64 * 6 // 8 + 3))
        assert (simulated.elements, simulated.bytes) == (comm.elements, comm.bytes)

    in_processes(ranks, tmp_path / "store", work)


def test_a_lost_rank_is_named(tmp_path):
    def work(rank: int) -> None:
        comm = DistributedComm()
        if rank == 1:
            return
        with pytest.raises(SpdError, match=r"^Rank 0 has lost another rank, which ended without a word"):
            comm.all_reduce([torch.ones(4)])

    in_two_processes(tmp_path / "store", work)


def test_other_errors_keep_their_words(tmp_path):
    def work(rank: int) -> None:
        comm = DistributedComm()
        with pytest.raises(RuntimeError, match="of my own"), comm._reaching_all():
            raise RuntimeError("of my own")
        with pytest.raises(SpdError, match=f"Rank {rank} has lost"), comm._reaching_all():
            raise RuntimeError("Connection closed by peer")
        dist.barrier()

    in_two_processes(tmp_path / "store", work)
