"""Files that start a run on several machines, for the engines that people have.

Each starts the same entry: `lora-fsdp train` where a machine starts one command, and what that
starts in every process (`lora_fsdp.cli.training_process`) where the engine starts them itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launcher:
    """One engine.

    Attributes:
        ending: of its file's name.
        text: of its file; what stands between @ is filled in.
        command: that starts it.
    """

    ending: str
    text: str
    command: str

    def filled(self, values: Mapping[str, object]) -> str:
        """The file's text, with values in it."""
        text = self.text
        for name, value in values.items():
            text = text.replace(f"@{name}@", str(value))
        return text


_SLURM = """\
#!/bin/bash
# sbatch @FILE@
#SBATCH --job-name=@NAME@
#SBATCH --nodes=@MACHINES@
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=@GPUS@
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=@NAME@-%j.log
# SIGTERM, which Slurm sends two minutes before the end, leaves a checkpoint; requeued, it goes on.
set -euo pipefail
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export FIRST
srun --kill-on-bad-exit=1 bash -c 'exec lora-fsdp train \\
  --config @RECIPE@ --accelerate_config @YAML@ \\
  --num_machines "$SLURM_JOB_NUM_NODES" --num_processes $((SLURM_JOB_NUM_NODES * @GPUS@)) \\
  --machine_rank "$SLURM_NODEID" --main_process_ip "$FIRST" --main_process_port 29500 \\
  --join_seconds 600 --resume_from_checkpoint if_any'
"""

_SKYPILOT = """\
# sky launch @FILE@
name: @NAME@
num_nodes: @MACHINES@
resources:
  accelerators: H100:@GPUS@
workdir: .
setup: |
  pip install lora-fsdp
run: |
  FIRST=$(echo "$SKYPILOT_NODE_IPS" | sed -n 1p)
  exec lora-fsdp train \\
    --config @RECIPE@ --accelerate_config @YAML@ \\
    --num_machines "$SKYPILOT_NUM_NODES" \\
    --num_processes $((SKYPILOT_NUM_NODES * SKYPILOT_NUM_GPUS_PER_NODE)) \\
    --machine_rank "$SKYPILOT_NODE_RANK" --main_process_ip "$FIRST" --main_process_port 29500 \\
    --join_seconds 600 --resume_from_checkpoint if_any
"""

_KUBEFLOW = """\
# kubectl apply -f @FILE@
# The image needs lora-fsdp and the recipe's files; the claim is where runs/ is kept.
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
metadata:
  name: @DNS@
spec:
  runtimeRef:
    name: torch-distributed
  trainer:
    image: REGISTRY/lora-fsdp:latest
    numNodes: @MACHINES@
    numProcPerNode: @GPUS@
    resourcesPerNode:
      limits:
        nvidia.com/gpu: @GPUS@
    command:
      - bash
      - -c
      - |
        exec lora-fsdp train \\
          --config @RECIPE@ --accelerate_config @YAML@ \\
          --num_machines "$PET_NNODES" --num_processes $((PET_NNODES * @GPUS@)) \\
          --machine_rank "$PET_NODE_RANK" --main_process_ip "$PET_MASTER_ADDR" \\
          --main_process_port "$PET_MASTER_PORT" --join_seconds 600 \\
          --resume_from_checkpoint if_any
"""

_RAY = '''\
"""The run on a Ray cluster: python @FILE@

Each worker becomes a process of the run, as a launcher would have started it.
"""

from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

MACHINES, GPUS = @MACHINES@, @GPUS@
OPTIONS = [
    *("--config", "@RECIPE@", "--accelerate_config", "@YAML@"),
    *("--resume_from_checkpoint", "if_any"),
]


def train(options):
    from lora_fsdp.cli.training_process import main

    main(options)


def start(*, workers=MACHINES * GPUS, use_gpu=True, options=OPTIONS, storage=None):
    trainer = TorchTrainer(
        train,
        train_loop_config=options,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        run_config=RunConfig(name="@NAME@", storage_path=storage),
    )
    return trainer.fit()


if __name__ == "__main__":
    start()
'''

_TORCHRUN = """\
#!/bin/bash
# bash @FILE@ FIRST_MACHINE     on every machine, at about the same time
# Elastic: where a machine dies, the others start again from the last checkpoint, with as many
# examples in a step; it may come back. Checkpoints lie on a disk that all machines share; if there
# is none, add --save_on_each_node true.
set -euo pipefail
FIRST=${1:?name the first machine, whose port 29500 is free}
# torchrun, in whose rendezvous a machine that has gone is noticed at any time.
exec python -m lora_fsdp.cli.torchrun \\
  --nnodes 1:@MACHINES@ --nproc_per_node @GPUS@ --max_restarts 100 \\
  --rdzv_id @NAME@ --rdzv_backend c10d --rdzv_endpoint "$FIRST:29500" \\
  --rdzv_conf join_timeout=600,last_call_timeout=30 \\
  --module lora_fsdp.cli.training_process \\
  --config @RECIPE@ --accelerate_config @YAML@ --allow_fsdp_on_one_process true \\
  --examples_per_step @EXAMPLES@ --stall_seconds 60 --resume_from_checkpoint if_any
"""

LAUNCHERS = {
    "slurm": Launcher(".sbatch", _SLURM, "sbatch {file}"),
    "skypilot": Launcher("_sky.yaml", _SKYPILOT, "sky launch {file}"),
    "kubeflow": Launcher("_trainjob.yaml", _KUBEFLOW, "kubectl apply -f {file}"),
    "ray": Launcher("_ray.py", _RAY, "python {file}"),
    "torchrun": Launcher("_torchrun.sh", _TORCHRUN, "bash {file} FIRST_MACHINE"),
}
