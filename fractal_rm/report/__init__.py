"""What a person looks at: the viewer of step scores, the plots, the quickstart report and the tables of results."""
