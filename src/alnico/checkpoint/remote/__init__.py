"""Reads and writes files at a URL: object stores, web servers, and other file systems."""
