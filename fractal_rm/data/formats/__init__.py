"""Readers of official data set files: bags labelled by the rules of the FRACTAL paper, one function a format."""
