"""Two real processes agree on one codebook, the one that a single process would learn."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.reference import vector_quantizer_worker as worker


def test_two_processes_keep_one_codebook(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    processes = [
        subprocess.Popen(
            [sys.executable, worker.__file__, rank, tmp_path],
            env=environment,
            stderr=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error.decode()
    first, second = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(2))
    assert first["world_size"] == second["world_size"] == 2
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name

    # Three rows of each process, though the second has four.
    assert first["gathered"].tolist() == [[0.0, 0.0]] * 3 + [[1.0, 1.0]] * 3

    alone = worker.moving_averages_only(slice(None))
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(first[f"averages.{name}"], tensor, atol=1e-6, rtol=0)

    # k-means saw both halves and the counts are those of the global batch.
    assert first["everything.is_initialized"]
    lengths = first["everything.codebook"].norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(worker.CODEBOOK_SIZE))
