"""`python -m codistill`, and what `torchrun -m codistill` starts."""

from codistill.cli.main import run

if __name__ == "__main__":
    run()
