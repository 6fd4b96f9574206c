"""Which token has which row: reads tokenizer files as data, and compares vocabularies. Runs no tokenizer."""
