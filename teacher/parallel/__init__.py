"""The teacher over many processes: expert parallelism, where its experts lie, and the pipeline's schedules.

One code for gloo on CPUs and NCCL on GPUs. `plan` says which rank sends what to which, `dispatch` and `low_latency` do
it, `fixed_places` does without a plan for FP8 experts, `moe` puts it under a model's routed experts.
"""
