"""What is rendered from records and measurements: pages, tables, pictures."""
