"""``python -m alnico``: the command line."""

from alnico.cli.entry import command

if __name__ == "__main__":
    command()
