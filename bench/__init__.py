"""Every figure of docs/benchmarks.md: `python -m bench` measures them and writes that page."""
