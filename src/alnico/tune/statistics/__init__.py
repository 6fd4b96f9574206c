"""Statistics of a model on data: Fisher information, Gram matrices, and BatchNorm running statistics."""
