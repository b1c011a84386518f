"""This project's engine behind the Teacher protocol: in one process, worker processes, ranks or nodes."""
