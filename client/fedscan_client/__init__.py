"""The agent at a hospital: everything that touches patient data, and nothing that leaves unchecked."""
