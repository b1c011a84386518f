"""The native engine: batched generation over the latent cache; and any teacher over HTTP.

`engine` adds, steps and retires sequences; `scheduler` chooses what a step computes, `block_manager` who holds which
pages, `step` is that as tensors, `runner` computes it; `operations` is the seam to a device (`plain` on a CPU,
`kernels` on a GPU); `cache` holds the latents; `weights` is the model laid out for inference; `sampler` draws tokens,
each sequence's by settings of its own. `loop` feeds an engine while it runs. `http` speaks OpenAI's protocol, with
`messages` for its bodies and `batching` between it and a teacher.
"""
