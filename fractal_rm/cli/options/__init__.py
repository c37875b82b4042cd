"""Arguments of the commands: flags, configuration files, help, and tasks and reward functions by name."""
