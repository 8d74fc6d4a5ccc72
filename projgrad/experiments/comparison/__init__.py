"""The comparison: methods x scenarios x seeds on real data, measured, saved run by run, drawn."""
