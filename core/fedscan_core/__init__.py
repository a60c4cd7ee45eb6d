"""What both sides agree on: configuration, errors, the wire, the accountant. Light to import."""
