"""Floor 7: what a person sees: progress, tables, plots and the report. Redrawn from records."""
