"""`python -m nmprune`: the command line, as torchrun starts it in several processes."""

from nmprune.cli import main

if __name__ == "__main__":
    main()
