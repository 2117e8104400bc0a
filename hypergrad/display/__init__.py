"""Results as tables, in text and in HTML; `hypergrad.plots` draws figures."""
