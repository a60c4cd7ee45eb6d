"""From the archive to the cohort: consent, de-identification, pixels, the encrypted cache."""
