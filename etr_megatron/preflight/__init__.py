"""What can be wrong with the machines of a job, found before step 1: versions, network, disks, clocks, model.

torchrun --nnodes 4 --nproc-per-node 8 ... -m etr_megatron.preflight CONFIG [key=value ...]

One table at the end, from rank 0. The exit code is 0 without a failure and 2 with one.
"""
