"""Readers of official data set files: one module a format, labelled by the rules of the FRACTAL paper."""
