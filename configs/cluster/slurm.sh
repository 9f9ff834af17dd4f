#!/bin/bash
# One run on two nodes with eight GPUs each:  sbatch configs/cluster/slurm.sh configs/online_v1.yaml train.accumulation=1 train.batch_size=2
# For one node: --nodes=1. A model that does not fit one GPU: train.shard=true (the weights are divided among all processes; keep to one node, since every layer is gathered in each pass). Slurm sends SIGTERM five minutes before the time is up: training finishes its step (within 30 s), saves and ends; the same command goes on from there.
#SBATCH --job-name=icl_distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=slurm-%j.log
set -euo pipefail
: "${1:?usage: sbatch configs/cluster/slurm.sh CONFIG [KEY=VALUE]...}"
export MAIN_IP=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=8
srun bash -c 'exec accelerate launch --multi_gpu --mixed_precision no --dynamo_backend no \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_IP" --main_process_port "$MAIN_PORT" -m icl_distill.train "$@"' train "$@"
