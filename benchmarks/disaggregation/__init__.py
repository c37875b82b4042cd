"""How much of what step labels teach is recovered from response labels?"""
