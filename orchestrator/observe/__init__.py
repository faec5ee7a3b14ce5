"""What happened, for people and programs: events, and what is made of them."""
