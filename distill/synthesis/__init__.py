"""Questions that a teacher writes after the model of others, without the asking: `pipelines.synthesis` does that.

`plan` says what is asked for, in which words (`prompts.yaml`); `reading` takes the question out of what was written;
`screen` drops what is not new, or is an evaluation's; `agreement` makes the reference of several answers.
"""

from distill.synthesis.agreement import Agreement, agreements
from distill.synthesis.plan import Attempt, WritingPlan
from distill.synthesis.prompts import PROMPTS_ID, hinted
from distill.synthesis.reading import read_question
from distill.synthesis.screen import Screen

__all__ = [
    "PROMPTS_ID",
    "Agreement",
    "Attempt",
    "Screen",
    "WritingPlan",
    "agreements",
    "hinted",
    "read_question",
]
