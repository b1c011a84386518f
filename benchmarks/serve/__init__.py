"""The engine's speed beside vLLM and transformers, the same weights for all, in one run.

    python -m benchmarks.serve [--engines ours,vllm,transformers] [--only students]

On a GPU: decode steps and prefill of a slice of DeepSeek-V3 (`v3`); published models at 1, 64, 256 and 512 in flight,
with all prompts at once and as places get free, where they have been fetched (`students`). On a CPU: the bundled pico
teacher and a student under 64 requests at once, and ours under half and twice as many (`pico`); published models in
FP32 and BF16 at 1, 6 and 32 streams, where they have been fetched (`real`). Every engine runs in a process of its own;
one that is not installed, or fails, is left out and named. Results go to benchmarks/results/<device>/serve.json, those
of `students` to serve-students.json.
"""
