"""What a configuration needs and how fast it would be, before anything is loaded; and what `auto` stands for."""
