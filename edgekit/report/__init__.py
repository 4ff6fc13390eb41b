"""The report of a compile: its schema, and what people see of it."""
