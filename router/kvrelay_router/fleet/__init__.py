"""The workers that joined: the Join stream, what each reported, and messages to them."""
