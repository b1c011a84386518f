"""What a server lets in: who may ask it, how large a body is, which JSON it takes.

Shared by potstill's own server (`teacher.http`) and by the vLLM server that it starts (`teacher.backends.vllm.routes`).
"""
