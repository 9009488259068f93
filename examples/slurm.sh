#!/usr/bin/env bash
# A run under SLURM that survives pre-emption and its time limit:
#   sbatch examples/slurm.sh --config configs/sd35_medium.yaml prompts.file=my_prompts.txt run.output_dir=runs/sd35_medium
# The checkout, the environment, the model, the prompts and run.output_dir need the same paths on every machine.
# Submit from the checkout, with the environment active. Add your cluster's partition and account.
#SBATCH --job-name=dpdmd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
# All memory of the machine: it holds a copy of a checkpoint during writing (dpdmd plan says how much).
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Ten minutes before the time limit the tasks get SIGTERM: the run finishes its update, saves a checkpoint and ends with status
# 75. On pre-emption a job also gets SIGTERM, and the seconds of the partition's GraceTime. If an update and a checkpoint take
# longer, the last regular checkpoint counts: set run.checkpoint_every.
#SBATCH --signal=TERM@600
set -u

# --resume works from the first start: without a checkpoint the run says so and begins. --wait gives the other tasks two minutes
# to end after one has failed.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait=120 python dpdmd/train.py --resume "$@"
status=$?

# Status 75: asked to end, so requeue. (With PreemptMode=REQUEUE, SLURM requeues a pre-empted job itself.) A plain `scancel` also
# requeues the job: `scancel --signal=KILL` ends it for good.
if [ "$status" -eq 75 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
