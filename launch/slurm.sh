#!/usr/bin/env bash
# One trainer over the nodes of a SLURM job, one process a node; jax asks SLURM who is who.
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh configs/my_run.toml --mesh.fsdp=32
# The run folder and the model folder must lie on a file system that all nodes share.
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=INT@300
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: sbatch --nodes=N launch/slurm.sh CONFIG.toml [--section.key=value ...]" >&2
  exit 2
fi
# A process that dies ends the others; srun then ends the job, and `sbatch ... --resume` goes on from the checkpoint.
exec srun --kill-on-bad-exit=1 magistral-jax train "$@" --distributed.coordinator=auto
