"""Bases become students: the zoo, supervised fine-tuning, publishing."""
