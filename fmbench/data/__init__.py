"""Where the images come from, the proof that they are the right ones, and what is made of them."""
