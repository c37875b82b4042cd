"""Do step rewards learned from response labels train better policies than the labels themselves?"""
