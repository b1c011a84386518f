"""The backend for OpenAI-compatible endpoints: vLLM, SGLang, DeepSeek's own, potstill's own server.

`teacher` is the Teacher, `client` asks and asks again, `concurrency` decides how many at a time, `completing` makes a
sample of one or two requests (budget forcing), `answers` and `streaming` read what comes, `secrets` keeps the key.
"""

from teacher.backends.openai.teacher import OpenAICompatibleTeacher

__all__ = ["OpenAICompatibleTeacher"]
