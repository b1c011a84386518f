"""Tags that enclose a model's reasoning: `<think>`, what was thought, `</think>`, the answer (arXiv 2501.12948)."""

THINK = "<think>"
THINK_LINE = f"{THINK}\n"  # as chat templates open it
END_OF_THINKING = "</think>"
