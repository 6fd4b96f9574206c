"""One file per encoding of a task vector's tensors: each writes its parts and measures what they lose."""
