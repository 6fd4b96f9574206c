"""One command with verbs. A verb parses, calls one library function, and prints: results to stdout, people's text to stderr."""
