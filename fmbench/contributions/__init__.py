"""What others bring: records checked, packed and accepted, and what became of them in git."""
