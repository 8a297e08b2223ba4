"""What the command line answers: the screen of help, the list of recipes, and what was meant by what is no key."""
