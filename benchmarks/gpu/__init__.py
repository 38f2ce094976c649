"""What is checked and measured on a GPU: `make gpu`, `make gpu-smoke`, `make gpu-table1`."""
