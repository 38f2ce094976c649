"""The command line, and the experiments that it runs; nothing outside of this folder imports it."""
