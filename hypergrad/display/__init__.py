"""Results as tables, in text and in HTML, and figures that notebooks show."""
