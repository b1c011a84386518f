"""Tags that enclose a model's reasoning: `<think>`, what was thought, `</think>`, the answer (arXiv 2501.12948)."""

THINK = "<think>"
THINK_LINE = f"{THINK}\n"  # as chat templates open it
END_OF_THINKING = "</think>"
# Stands between thinking and answer in R1's format; written in the model's place when its budget is used up.
FORCED_END = f"\n{END_OF_THINKING}\n\n"
