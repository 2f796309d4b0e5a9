"""Programs around the paper's code, run as `python -m tools.NAME`. Nothing in the paper's code needs them."""
