"""Floor 6: what a person sees: progress, tables, plots and the report. Redrawn from records."""
