"""Models in the files that trainers leave: shards of many processes, partitions of an optimizer, averages."""
