"""The report of a run: summary.json, plots, and one page that stands alone."""
