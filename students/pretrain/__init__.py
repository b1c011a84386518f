"""Making of the bundled pico bases: their text, their tokenizer, their pre-training."""
