"""One file per command: its declaration and its text for people. Each is imported when the command is used."""
