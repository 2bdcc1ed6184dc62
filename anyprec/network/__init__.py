"""What a network is: its layers, norms and how they are connected, without a change to it."""
