"""Models as callers have them: paths, hub ids, dicts of tensors, modules; each opened as a source of tensors."""
