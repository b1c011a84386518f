"""Mathematical answers against their references: typesetting taken off, structure read, values compared.

What we cannot read in a *reference* is left to math-verify; what we cannot read in an *answer* is wrong.
"""
