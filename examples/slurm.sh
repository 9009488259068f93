#!/usr/bin/env bash
# A run under SLURM that may be pre-empted and may outlast its time limit:
#   sbatch examples/slurm.sh --config configs/sd35_medium.yaml prompts.file=my_prompts.txt run.output_dir=runs/sd35_medium
# The checkout, the environment, the model, the prompts and run.output_dir are the same paths on every machine.
#SBATCH --job-name=dpdmd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Ten minutes before the time is over all tasks get SIGTERM, as they do when the job is pre-empted: the run finishes its update,
# saves a checkpoint and ends with status 75.
#SBATCH --signal=TERM@600
set -u

# --resume from the first start on: where there is no checkpoint yet it says so and begins.
srun --kill-on-bad-exit=1 python dpdmd/train.py --resume "$@"
status=$?

# Pre-empted jobs are put back into the queue by SLURM itself; one whose time is over asks for it.
if [ "$status" -eq 75 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
