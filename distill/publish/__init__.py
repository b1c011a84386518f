"""Publishing: the Hugging Face Hub's client, and traces as a data set with its card."""
