"""Charts: functions from records to Vega-Lite, which a page shows, a notebook too, and which export as SVG and PDF."""
