"""The coordinating centre: rounds, aggregation, checkpoints, reports. It never sees patient data."""
