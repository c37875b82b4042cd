"""How good are reward models from response labels on official benchmarks?"""
