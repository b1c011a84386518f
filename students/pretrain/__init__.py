"""How the bundled pico bases are made: their text, their tokenizer, their pre-training."""
