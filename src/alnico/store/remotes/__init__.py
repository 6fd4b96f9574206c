"""Stores of task vectors elsewhere: folders, web servers, S3 and other file systems, and the hub."""
