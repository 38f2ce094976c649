"""What is measured on CPU alone."""
