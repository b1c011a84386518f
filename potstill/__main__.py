"""`python -m potstill` is `potstill`, for launchers that start modules, torchrun among them."""

from pipelines.cli import main

if __name__ == "__main__":
    main()
