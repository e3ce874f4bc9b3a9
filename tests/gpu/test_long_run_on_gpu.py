"""GPU memory stays flat over a long run, and host memory beside it.

Run: python -m pytest -s tests/gpu/test_long_run_on_gpu.py
"""

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from tests.hygiene.long_run import long_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
STEPS = 2000
MEBIBYTE = 2**20


class MeasureGpu(TrainerCallback):
    """What tensors hold, and what torch has taken from the device, at every 20th step."""

    def __init__(self):
        self.rows = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 20 == 0:
            self.rows.append(
                (
                    state.global_step,
                    torch.cuda.memory_allocated() / MEBIBYTE,
                    torch.cuda.memory_reserved() / MEBIBYTE,
                )
            )


def test_memory_is_flat(tmp_path):
    measure = MeasureGpu()
    grown = long_run(tmp_path, STEPS, every=20, callbacks=[measure])
    table = np.array(measure.rows)
    warm = table[table[:, 0] > STEPS // 2]
    slope = 1000 * np.polyfit(warm[:, 0], warm[:, 1], 1)[0]
    print(
        f"\n{torch.cuda.get_device_name()}, steps {STEPS // 2} to {STEPS}: allocated "
        f"{slope:+.3f} MiB a thousand steps, {warm[[0, -1], 1].tolist()} MiB; reserved "
        f"{warm[[0, -1], 2].tolist()} MiB; host {grown['slope']:+.2f} MiB a thousand steps, "
        f"files {grown['files']}, threads {grown['threads']}"
    )
    # A tensor kept every step would be at least 512 bytes, the smallest block: 0.5 MiB.
    assert abs(slope) < 0.25
    assert warm[-1, 2] == warm[0, 2]
    assert grown["slope"] < 20
    assert grown["files"][0] == grown["files"][1]
