"""The results as a page for a browser, and its loopback server."""
