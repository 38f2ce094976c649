"""Networks in cells: methods against each other, and the tables and figures of the paper."""
