"""Settings that every test needs before the first heavy import."""

import os

# Flower and Ray read these when they are imported: no test calls home.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from hypothesis import settings

# Time limits per example fail on busy machines and say nothing about the code. In CI the examples
# are the same every time: a failure there is the change's, not the dice's.
settings.register_profile("fedscan", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("fedscan")
