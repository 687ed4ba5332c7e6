#!/bin/bash
# A grid as a SLURM array job, one task a cell. On the login node, once:
#   meadef grid experiments/paper/table1.yaml --dry-run          writes every cell.yaml and runs/paper/table1/commands.txt
#   sbatch --array=1-$(wc -l < runs/paper/table1/commands.txt) experiments/schedulers/slurm_array.sh runs/paper/table1
# and when it is done: meadef grid experiments/paper/table1.yaml --merge
# A task that was cut off goes on where it stopped: submit the same array again; cells that are done end at once.
#SBATCH --job-name=meadef
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=24:00:00
#SBATCH --signal=INT@60
#SBATCH --output=meadef-%A-%a.log
set -euo pipefail
directory=${1:?usage: sbatch --array=1-N slurm_array.sh DIRECTORY_OF_THE_GRID}
command=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$directory/commands.txt")
# exec, so that SLURM's signal reaches the training, which then marks its stage as interrupted
eval "exec srun $command"
