"""Benchmarks: each script asks one question, and is run from the repository as `python -m benchmarks.FOLDER.NAME`."""
