"""What all commands have in common: folders of runs, input that is rejected in one line, progress."""
