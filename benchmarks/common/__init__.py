"""What benchmarks of several folders share."""
