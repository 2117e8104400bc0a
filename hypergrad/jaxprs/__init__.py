"""Facts about functions that are read from their jaxprs."""
