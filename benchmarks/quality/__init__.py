"""Eight real text tasks, one real encoder, specialists of it, and what every way of merging them keeps."""
