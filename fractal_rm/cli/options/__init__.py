"""What commands can be told: flags, files of flags, their help, tasks and reward functions by name."""
