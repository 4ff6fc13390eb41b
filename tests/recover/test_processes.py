"""Recovery by several processes, which share each step's samples: two on this machine take the steps of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgekit.recover import Settings, recover
from tests.recover.residual_networks import arrays, batches, network

SETTINGS = Settings(steps={"blocks": 8, "distill": 10}, threads=1, batch=16)


def work(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    student = network(disturbed=0.2)
    recover(student, network(), batches(), SETTINGS)
    np.savez(f"{folder}/{rank}.npz", **arrays(student))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    alone = network(disturbed=0.2)
    recover(alone, network(), batches(), SETTINGS)
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in (0, 1))
    for name, array in arrays(alone).items():
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_allclose(first[name], array, rtol=1e-2, atol=1e-3)
    changed = [name for name, array in arrays(network(disturbed=0.2)).items() if not np.array_equal(array, first[name])]
    assert len(changed) > 10
