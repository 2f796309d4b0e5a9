"""Programs around the paper's code, run as `python -m tools.NAME`. Nothing in the paper's code needs them."""

import common  # noqa: F401  its check of Python comes first
