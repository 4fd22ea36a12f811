"""`python -m tpfuse`: the command line."""

from tpfuse.cli import main

if __name__ == "__main__":  # ranks that it starts import this module as well
    main()
