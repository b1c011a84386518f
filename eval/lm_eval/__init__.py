"""lm-eval's own tasks as suites, `lm_eval:TASK`: `tasks` finds and loads them, `model` answers, `kept` asks once,
`scoring` makes ScoreCards of what lm-eval makes of the answers."""
