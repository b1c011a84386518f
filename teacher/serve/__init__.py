"""The native engine: batched generation over the latent cache; and any teacher over HTTP.

`engine` admits, steps and retires sequences; `runner` computes one prefill or one decode step; `cache` holds the
latents; `weights` is the model laid out for inference; `sampler` draws tokens. `http` speaks OpenAI's protocol, with
`messages` for its bodies and `batching` between it and a teacher.
"""
