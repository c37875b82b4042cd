"""Output for people: the viewer of step scores, plots, the quickstart report and tables of results."""
