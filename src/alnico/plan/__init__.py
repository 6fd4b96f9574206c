"""What will be done: recipe and headers to a frozen :class:`Plan` with its bytes. Refuses before a tensor is read."""
