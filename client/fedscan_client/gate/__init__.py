"""The two doors of a site: what a run may ask, and what may leave."""
