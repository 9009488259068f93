"""Teacher, student and critic in GPU memory together: who is sharded how, and what one update is."""
