"""The making of a teacher of our own: its text, its tokenizer, its training recipe."""
