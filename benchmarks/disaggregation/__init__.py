"""How much of the benefit of step labels can be recovered from response labels?"""
