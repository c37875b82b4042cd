"""Records to bags: responses with one label, cut into steps."""
