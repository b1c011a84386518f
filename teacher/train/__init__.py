"""How a teacher of our own is made: its text, its tokenizer, its training recipe."""
