"""Networks that process a part of their input."""
