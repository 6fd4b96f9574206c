"""The command line, derived from the public functions: ``main.py`` finds a command, ``commands/`` declares each."""
