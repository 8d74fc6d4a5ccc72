"""The benchmarks that users run too: `projgrad bench`."""
