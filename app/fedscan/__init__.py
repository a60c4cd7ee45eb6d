"""The front door: the command line, and simulation with pretend hospitals."""
