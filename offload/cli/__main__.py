"""`python -m offload.cli`: the command, where the console script is not installed."""

from offload.cli.main import main

if __name__ == "__main__":
    main()
