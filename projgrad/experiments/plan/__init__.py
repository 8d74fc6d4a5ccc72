"""How much memory and work a step takes, before anything is allocated: `projgrad plan`."""
