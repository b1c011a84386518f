"""The native engine: batched generation over a paged cache; and any teacher over HTTP.

`engine` adds, steps and retires sequences; `scheduler` chooses what a step computes, `block_manager` who holds which
pages, `step` is that as tensors, `runner` has a model compute it over the `cache`. `architecture` is what it asks of a
model, `latent_model` the teacher's; its `operations` are the seam to a device (`plain` for a CPU, `kernels` for a GPU),
its `weights` the checkpoint's laid out for inference. `sampler` draws tokens, each sequence's by settings of its own,
and `speculation` drafts them ahead with the MTP layer.
`loop` feeds an engine while it runs. `http` speaks OpenAI's protocol, with `messages` for its bodies, `forms` for its
answers, `guard` before it, `metrics` beside it, and `teacher.http.feed` between it and a teacher.
"""
