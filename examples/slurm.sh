#!/usr/bin/env bash
# A run under SLURM that may be pre-empted and may outlast its time limit:
#   sbatch examples/slurm.sh --config configs/sd35_medium.yaml prompts.file=my_prompts.txt run.output_dir=runs/sd35_medium
# The checkout, the environment, the model, the prompts and run.output_dir are the same paths on every machine.
# Submit from the checkout, with the environment active, and add the partition and account of your cluster.
#SBATCH --job-name=dpdmd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
# All memory of the machine: a checkpoint is copied to it while it is written (python -m dpdmd.plan says how much).
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Ten minutes before the time is over the tasks get SIGTERM: the run finishes its update, saves a checkpoint and ends with
# status 75. A job that is pre-empted gets SIGTERM too, and as many seconds as the partition's GraceTime has; where those are too
# few for an update and a checkpoint, what counts is run.checkpoint_every.
#SBATCH --signal=TERM@600
set -u

# --resume from the first start on: where there is no checkpoint yet it says so and begins. --wait: when a task has failed the
# others have two minutes to end.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait=120 python dpdmd/train.py --resume "$@"
status=$?

# Asked to end, not failed: back into the queue. (Where the partition has PreemptMode=REQUEUE, SLURM puts a job that it pre-empts
# there itself.) `scancel` would come to the same: to end the job for good use `scancel --signal=KILL`.
if [ "$status" -eq 75 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
