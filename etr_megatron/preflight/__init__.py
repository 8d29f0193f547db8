"""Check the machines of a job before step 1: versions, network, disks, clocks, model, data.

torchrun --nnodes 4 --nproc-per-node 8 ... -m etr_megatron.preflight CONFIG [key=value ...]

Rank 0 prints one table at the end. The exit code is 0, or 2 if a check fails.
"""
