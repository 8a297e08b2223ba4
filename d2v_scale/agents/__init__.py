"""One launcher on each node of a job: they agree on who trains, start ranks again after a fault, and put a spare node
in a lost one's place. Torch-free."""
