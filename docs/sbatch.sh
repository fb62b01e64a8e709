#!/usr/bin/env bash
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
# sbatch docs/sbatch.sh RECIPE [flags of train.py]
# Two minutes before the time ends, Slurm sends SIGUSR1 to this script, which stops the ranks: they
# write a checkpoint. The job goes back into the queue, and continues from there. (Not run by us.)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$SLURM_GPUS_ON_NODE" \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID.$SLURM_RESTART_COUNT" --rdzv_endpoint "$head:29500" \
    train.py "$@" &
ranks=$!
stop() {
    scancel --signal=TERM "$SLURM_JOB_ID"  # to torchrun, which passes it on; not to this script
    wait "$ranks"
    scontrol requeue "$SLURM_JOB_ID"
}
trap stop USR1
wait "$ranks"
