#!/usr/bin/env bash
# iw-SFT of a 32B model on two nodes of 8 GPUs. Adapt the first lines, then: sbatch benchmarks/llm/slurm/job.sh
#SBATCH --job-name=iw-sft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --output=slurm-%j.out
# A requeued job continues from its last checkpoint: --resume below.
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch from the root of the checkout}"
source .venv/bin/activate

# What every node must agree on. NODE_RANK is set by each node for itself.
export NNODES=$SLURM_NNODES
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
# All nodes read weights and data from a shared folder; nothing is downloaded while the GPUs wait.
export HF_HUB_OFFLINE=1

# One task per node: it starts one process per GPU. --kill-on-bad-exit: a lost node ends the others too.
srun --kill-on-bad-exit=1 bash -c '
  NODE_RANK=$SLURM_NODEID exec python -m benchmarks.llm --batch-size 16 \
    --recipe s1k --algo iw-sft --deepspeed multi_node --out runs/s1k --resume
'
