"""A stand-in for the server's package in the processes of a test's coordinator."""
