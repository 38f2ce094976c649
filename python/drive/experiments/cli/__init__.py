"""The command `drive`: options in, run folders out."""
