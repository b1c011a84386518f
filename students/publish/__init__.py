"""Publishing a student: the model card and the push to the Hub."""
