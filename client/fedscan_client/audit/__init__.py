"""The site's audit log: what left, who decided what, and the proof that nobody changed it since."""
